"""An argument of a public function that is none of its choices is refused by name."""

import numpy as np
import pytest
from flax import nnx

from vlm.errors import ConfigError
from vlm.exporting.storing import stored
from vlm.heads.codes import encode
from vlm.heads.few_shot import fit_head
from vlm.nn.transformer import Execution, Transformer
from vlm.training.step import compute_dtype

Z = np.eye(4, dtype=np.float32)


def transformer(**changes):
    sizes = {"width": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "act": "gelu", "norm_eps": 1e-6}
    return Transformer(**sizes, execution=Execution(), rngs=nnx.Rngs(0), **changes)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transformer(norm="rms"), "norm is 'rms': choose one of 'pre', 'post', 'branch'"),
        (lambda: transformer(mlp="gelu"), "mlp is 'gelu': choose one of 'plain', 'swiglu'"),
        (lambda: Execution(remat="minimal"), "remat is 'minimal': choose one of 'none', 'dots'"),
        (lambda: fit_head(Z, np.arange(4), "svm", None, 1.0), "method is 'svm': choose one of"),
        (lambda: compute_dtype("bf16"), "dtype is 'bf16': choose one of 'auto', 'float32'"),
        (lambda: encode(Z, "int4", Z[0]), "coding is 'int4': choose one of 'int8', 'binary'"),
        (lambda: stored(("a",), Z, "int4"), "dtype is 'int4': choose one of 'float32'"),
    ],
)
def test_an_argument_that_is_no_choice_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
