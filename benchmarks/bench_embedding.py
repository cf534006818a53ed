"""Three look-ups, LayerNorm and dropout against the eager composition, and torch.compile of that.

With BERT's own tables: the gradient of 30522 words is by far the largest thing that moves.
"""

import pytest
import torch.nn.functional as F

from bertfast import testing

from .rows import DIRECTIONS, DTYPES, IMPLEMENTATIONS, time_rows

TOKENS, COLUMNS, WORDS, POSITIONS = 1024, 768, 30522, 512


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def bench_embedding(benchmark, dropout_p, direction, dtype, implementation):
    case = testing.embedding_case(
        TOKENS,
        COLUMNS,
        name=f"p{dropout_p}",
        vocabulary=WORDS,
        positions=POSITIONS,
        dropout_p=dropout_p,
    )

    def eager(t):
        total = F.embedding(t["input_ids"], t["word"])
        total = total + F.embedding(t["position_ids"], t["position"])
        total = total + F.embedding(t["token_type_ids"], t["token_type"])
        y = F.layer_norm(total, (COLUMNS,), t["weight"], t["bias"], 1e-12)
        return F.dropout(y, dropout_p)

    # Forward: the words' rows and the output, the other tables being in the cache. Backward: the
    # words' rows, the output's gradient, and the tables' gradients whole.
    moved = {"forward": 2, "backward": 2 + (WORDS + POSITIONS) / TOKENS}
    time_rows(benchmark, case, eager, implementation, direction, dtype, moved)
