"""Native models under whoever records or transforms them: right on other masks and other shapes."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import bertfast

CONFIG = bertfast.BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=40,
)
CLASSES = (
    bertfast.BertModel,
    bertfast.BertForMaskedLM,
    bertfast.BertForSequenceClassification,
    bertfast.BertForQuestionAnswering,
)
by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[Tensor, Tensor]


class Flat(nn.Module):
    """A model whose outputs are a tuple, as tracing wants them."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = cls(CONFIG)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(input_ids, attention_mask).to_tuple())


def batch(lengths: list[int], columns: int, left: bool = False) -> Batch:
    """Sequences padded on the right or on the left, with ids there that are no ids."""
    generator = torch.Generator().manual_seed(columns)
    ids = torch.randint(0, 50, (len(lengths), columns), generator=generator)
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return ids.masked_fill(mask == 0, -7), mask


RECORDED = batch([7, 4, 1], 7)
OTHERS = [
    batch([2, 7, 5], 7, left=True),
    batch([7, 7, 7], 7),
    batch([0, 3, 0], 7),
]
OTHER_SHAPES = [batch([9, 2, 8, 1, 4], 9), batch([40, 40], 40), batch([3], 3, left=True)]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@by_class
def test_a_trace(cls: type[nn.Module]) -> None:
    model = Flat(cls)
    with torch.no_grad():
        traced = torch.jit.trace(model, RECORDED)
        for other in OTHERS + OTHER_SHAPES:
            assert_same(traced(*other), model(*other))
    assert "bertfast::attention" in str(traced.inlined_graph)


@pytest.mark.parametrize(
    ("cls", "strict"),
    [*((cls, False) for cls in CLASSES), (bertfast.BertForMaskedLM, True)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_export(cls: type[nn.Module], strict: bool) -> None:
    model = Flat(cls)
    rows, columns = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("columns", max=40)
    shapes = {name: {0: rows, 1: columns} for name in ("input_ids", "attention_mask")}
    program = torch.export.export(model, RECORDED, dynamic_shapes=shapes, strict=strict).module()
    with torch.no_grad():
        for other in OTHERS + OTHER_SHAPES:
            assert_same(program(*other), model(*other))
    # Its weights are trained like the model's.
    out = program(*OTHERS[0])[0].square().mean()
    expected = model(*OTHERS[0])[0].square().mean()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(out, list(program.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    gradients = dict(zip([name for name, _ in program.named_parameters()], found, strict=True))
    for (name, _), gradient in zip(parameters.items(), wanted, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_graph_of_real_values() -> None:
    model = Flat(bertfast.BertForMaskedLM)
    with torch.no_grad():
        graph = make_fx(model)(*RECORDED)
        for other in OTHERS:
            assert_same(graph(*other), model(*other))


def test_losses_are_recorded_for_other_labels() -> None:
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(CONFIG).eval()
    ids, mask = RECORDED

    def loss(labels: Tensor) -> Tensor:
        return model(ids, mask, labels=labels).loss

    one, none, all_of_them = (torch.full_like(ids, -100) for _ in range(3))
    one[0, 2] = 3
    all_of_them[:] = 5
    with torch.no_grad():
        graph = make_fx(loss)(one)
        for labels in (one, none, all_of_them):
            torch.testing.assert_close(graph(labels), loss(labels))


def test_attention_probabilities_are_recorded_for_other_masks() -> None:
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(CONFIG).eval()

    def attentions(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return model(ids, mask, output_attentions=True).attentions

    with torch.no_grad():
        graph = make_fx(attentions)(*RECORDED)
        for other in OTHERS:
            assert_same(graph(*other), attentions(*other))


def test_what_is_too_long_is_refused_when_it_is_recorded() -> None:
    ids = torch.zeros(1, 41, dtype=torch.long)
    positions = ids.clone()  # by which it would do in eager mode
    model = bertfast.BertModel(CONFIG).eval()
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        make_fx(lambda x: model(x, position_ids=positions).last_hidden_state)(ids)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@by_class
def test_functional_gradients(cls: type[nn.Module]) -> None:
    model = Flat(cls)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        first = functional_call(model, values, (ids, mask))[0]
        return first.clamp(min=-100.0).square().sum()  # scores on padding are the lowest number

    def expected(ids: Tensor, mask: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            loss(parameters, ids, mask), list(parameters.values()), allow_unused=True
        )

    def check(found: dict[str, Tensor], wanted: tuple[Tensor | None, ...]) -> None:
        for a, b in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(
                a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4
            )

    ids, mask = RECORDED
    check(grad(loss)(parameters, ids, mask), expected(ids, mask))

    def one(values: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        return loss(values, ids[None], mask[None])

    each = vmap(grad(one), in_dims=(None, 0, 0))(parameters, ids, mask)
    for i in range(len(ids)):
        found = {name: x[i] for name, x in each.items()}
        check(found, expected(ids[i : i + 1], mask[i : i + 1]))


@pytest.mark.parametrize("labelled", [False, True], ids=["model", "loss"])
def test_checkpointing_a_whole_model(labelled: bool) -> None:
    torch.manual_seed(0)
    model = bertfast.BertForMaskedLM(CONFIG)
    ids, mask = RECORDED
    labels = ids.clamp(min=0) if labelled else None

    def loss(ids: Tensor, mask: Tensor) -> Tensor:
        out = model(ids, mask, labels=labels, seed=1)
        return out.loss if labelled else out.logits.square().mean()

    parameters = list(model.parameters())
    out = checkpoint(loss, ids, mask, use_reentrant=False)
    found = torch.autograd.grad(out, parameters)
    for a, b in zip(found, torch.autograd.grad(loss(ids, mask), parameters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
@by_class
def test_onnx_by_tracing_is_refused_by_name(cls: type[nn.Module]) -> None:
    file = io.BytesIO()
    with pytest.raises(NotImplementedError, match=r"bertfast\.ops\.embedding: ONNX"):
        torch.onnx.export(Flat(cls), RECORDED, file, dynamo=False)
    assert file.getvalue() == b""
