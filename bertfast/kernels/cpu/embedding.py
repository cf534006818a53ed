"""embedding on the CPU: ``csrc/cpu/embedding.cpp``."""

import torch
from torch import Tensor

from bertfast.kernels import cpu
from bertfast.kernels.cpu import check_launch, dtype_code, threads
from bertfast.kernels.layout import address, dense, dense_or_none

# How many tokens' shares of a table's gradient are summed at a time.
_CHUNK = 64


def supports(x: Tensor) -> str | None:
    return cpu.unsupported(x)


def _rows(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[0]


def _wide(ids: Tensor | None) -> bool:
    return ids is not None and ids.dtype == torch.int64


def forward(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    threshold: int,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    input_ids, position_ids = dense(input_ids), dense(position_ids)
    token_type_ids, token_type = dense_or_none(token_type_ids), dense_or_none(token_type)
    word, position, weight, bias = dense(word), dense(position), dense(weight), dense(bias)
    tokens, columns = input_ids.numel(), word.shape[1]
    # float16, which only autocast asks for, is not the kernel's to write.
    out_dtype = torch.float32 if dtype == torch.float16 else dtype
    out = word.new_empty((*input_ids.shape, columns), dtype=out_dtype)
    statistics = torch.empty(2, tokens, dtype=torch.float32, device="cpu")
    status = cpu.library().embedding_forward(
        input_ids.data_ptr(),
        position_ids.data_ptr(),
        address(token_type_ids),
        word.data_ptr(),
        position.data_ptr(),
        address(token_type),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        statistics.data_ptr(),
        address(seed),
        word.shape[0],
        position.shape[0],
        _rows(token_type),
        tokens,
        columns,
        _wide(input_ids),
        _wide(position_ids),
        _wide(token_type_ids),
        eps,
        threshold,
        site,
        dtype_code(word),
        dtype_code(weight),
        dtype_code(out),
        threads(),
    )
    if status:
        check_launch(status, "embedding_forward", tokens=tokens, columns=columns, dtype=word.dtype)
    return out.to(dtype), statistics


def backward(
    dout: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    padding_idx: int,
    threshold: int,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout = dense(dout.float() if dout.dtype == torch.float16 else dout)
    input_ids, position_ids = dense(input_ids), dense(position_ids)
    token_type_ids, token_type = dense_or_none(token_type_ids), dense_or_none(token_type)
    word, position, weight = dense(word), dense(position), dense(weight)
    tokens, columns = input_ids.numel(), word.shape[1]
    blocks = cpu.row_blocks(tokens)
    dword, dposition = torch.empty_like(word), torch.empty_like(position)
    dtoken_type = word.new_empty(0) if token_type is None else torch.empty_like(token_type)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    # One allocation for the kernel's float scratch, the large part first.
    ds_size, partial_size = tokens * columns, blocks * 2 * columns
    parts_size = 3 * -(-tokens // _CHUNK) * 2 * columns
    scratch = torch.empty(ds_size + partial_size + parts_size, dtype=torch.float32, device="cpu")
    ds = scratch.data_ptr()
    readers = torch.empty(4 * tokens * 2, dtype=torch.int64, device="cpu")
    status = cpu.library().embedding_backward(
        dout.data_ptr(),
        input_ids.data_ptr(),
        position_ids.data_ptr(),
        address(token_type_ids),
        word.data_ptr(),
        position.data_ptr(),
        address(token_type),
        weight.data_ptr(),
        statistics.data_ptr(),
        dword.data_ptr(),
        dposition.data_ptr(),
        dtoken_type.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        ds,
        ds + 4 * ds_size,
        ds + 4 * (ds_size + partial_size),
        readers.data_ptr(),
        address(seed),
        word.shape[0],
        position.shape[0],
        _rows(token_type),
        tokens,
        columns,
        blocks,
        _CHUNK,
        padding_idx,
        _wide(input_ids),
        _wide(position_ids),
        _wide(token_type_ids),
        threshold,
        site,
        dtype_code(word),
        dtype_code(weight),
        dtype_code(dout),
        threads(),
    )
    if status:
        check_launch(status, "embedding_backward", tokens=tokens, columns=columns, dtype=word.dtype)
    return dword, dtoken_type, dposition, dweight, dbias
