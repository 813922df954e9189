"""One transformer compiled for a TPU without a TPU: no time in padding and copies of heads."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vlm.config import MeshConfig
from vlm.nn import Execution, Transformer
from vlm.planning.hlo import parse
from vlm.planning.topology import parse_topology, topology_devices
from vlm.sharding import batch_sharding, make_mesh, placed, shardings

LARGEST_SHARE = 0.03  # of estimated cycles, in copies and layout changes
# With few heads and much attention, whose time is not estimated, the loop's own copies weigh more.
OF_LONG = 0.05


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed (extra `tpu`)",
)
@pytest.mark.parametrize(
    ("head_dim", "heads", "tokens", "share"),
    [
        (72, 16, 256, LARGEST_SHARE),
        (80, 16, 257, LARGEST_SHARE),
        (104, 16, 257, LARGEST_SHARE),  # needs more than the compiler's default of VMEM
        (128, 8, 256, LARGEST_SHARE),
        (64, 12, 2048, OF_LONG),
    ],
)
def test_heads_of_any_size_are_neither_padded_nor_copied(head_dim, heads, tokens, share):
    """Forward and backward pass of a scanned stack, with the tokens of an image."""
    width, rows = head_dim * heads, 2**14 // tokens
    mesh = make_mesh(MeshConfig(fsdp=1), topology_devices(parse_topology("v5p:2x2x1")))

    def make():
        execution = Execution(dtype=jnp.bfloat16)
        options = {"act": "gelu_tanh", "norm_eps": 1e-6, "rngs": nnx.Rngs(0)}
        return Transformer(width, 2, heads, 4 * width, execution=execution, **options)

    graph, state = nnx.split(nnx.eval_shape(make))
    parameters = jax.tree.map(placed, state, shardings(state, mesh))
    shape = (rows * mesh.size, tokens, width)
    x = placed(jax.ShapeDtypeStruct(shape, jnp.bfloat16), batch_sharding(mesh))

    def loss(parameters, x):
        return jnp.square(nnx.merge(graph, parameters)(x).astype(jnp.float32)).mean()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parameters, x).compile()
    program = parse(compiled.as_text())
    kernels = [i.name for i, _, _ in program.walk() if "tpu_custom_call" in i.text]
    assert len(kernels) == 3  # forward, recomputed, backward
    total, layout = program.cycles()
    assert total > 0
    assert layout < share * total
