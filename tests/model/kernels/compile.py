"""Compile every kernel for GPUs that need not be there, and print what each takes as JSON.

python -m tests.model.kernels.compile PRESET ARCHITECTURE
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.config import SeqSetVAEConfig
from model.kernels import attention, causal, chamfer, noise, norms, pooling, posterior, rows

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = dict.fromkeys(
    (
        "slot_offsets",
        "sizes",
        "num_single",
        "tile_set",
        "tile_begin",
        "tile_patient",
        "order",
        "offsets",
        "key",
        "num_sets",
    ),
    "*i64",
)
SCALARS = {
    "scale": "fp32",
    "eps": "fp32",
    "keep_share": "fp32",
    "free_bits": "fp32",
    "log_period": "fp32",
    "threshold": "i32",
}
SCALARS |= dict.fromkeys(("num_slots", "num_segments", "total", "width", "salt", "num_rows", "rows_each"), "i64")
FLOATS = dict.fromkeys(
    ("log_sums", "sums", "stats", "gain", "shift", "grad", "target", "mu", "logvar", "grad_mu", "grad_logvar"), "*fp32"
)


TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernels(config: SeqSetVAEConfig, dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """Yield kernels with the constants that the model runs them with, and arguments whose type is their own."""
    heads, points, width = config.heads, config.inducing_points, config.width
    of_set = attention._constants(heads, points, width)
    yield attention.gather_forward, of_set | {"BLOCK_D": min(of_set["BLOCK_D"], attention.MAX_COLUMNS)}, {}
    yield attention.gather_backward, of_set | {"BLOCK_D": min(of_set["BLOCK_D"], attention.BACKWARD_CHANNELS)}, {}
    yield attention.scatter_forward, of_set, {}
    yield attention.scatter_backward, of_set, {}
    yield attention.scatter_backward, of_set, {"keys": "*fp32", "grad_keys": "*fp32"}  # of a norm under autocast
    distances = chamfer._constants(width, 1e-6)
    yield chamfer.nearest_kernel, distances, {"nearest": "*i32"}
    yield chamfer.gradient_kernel, distances | {"num_warps": chamfer.GRADIENT_WARPS}, {"nearest": "*i32"}
    for of_heads in (1, heads):
        for has_order in (False, True):
            block = {"BLOCK_D": triton.next_power_of_2(width // of_heads), "ROWS": pooling.ROWS}
            pool = {"H": of_heads, "WIDTH": width // of_heads, **block, "HAS_ORDER": has_order}
            yield pooling.pool_forward, pool, {"out": "*fp32"}
            yield pooling.pool_backward, pool, {"out": "*fp32", "grad_out": "*fp32"}
    of_sequence = causal._constants(torch.empty(1, 3, heads, width // heads, dtype=dtype))
    yield causal.causal_forward, of_sequence, {}
    yield causal.causal_backward, of_sequence, {}
    yield rows.sum_kernel, {"WIDTH": width, "ROWS": rows.ROWS, "COLUMNS": rows.COLUMNS, "HAS_ORDER": True}, {}
    for row in (torch.empty(width), torch.empty(1, width)):
        norm, output = norms._constants(width, row), {"out": "*fp32"}
        yield norms.norm_forward, norm, output
        yield norms.norm_forward, norm, output | {"x": "*fp32"}
        yield norms.norm_backward, norm | {"HAS_MORE": norm["IS_ROW"]}, {}
        yield norms.norm_backward, norm | {"HAS_MORE": norm["IS_ROW"]}, {"x": "*fp32", "grad_sum": "*fp32"}
    relu = {"WIDTH": config.set_feed_forward, "COLUMNS": norms.COLUMNS, "ROWS": norms.TILE_CELLS // norms.COLUMNS}
    yield norms.relu_backward, relu, dict.fromkeys(("grad", "hidden"), f"*{TRITON_TYPES[dtype]}")
    yield noise.dropout_kernel, {"WIDTH": width, "BLOCK": noise.BLOCK}, {}
    yield noise.normal_kernel, {"HALF": width // 2, "BLOCK": noise.BLOCK}, {"out": "*fp32"}
    yield noise.sinusoids_kernel, {"HALF": width // 2, "BLOCK": noise.BLOCK}, {"out": "*fp32", "position": "*i64"}
    yield posterior.divergence_kernel, {"BLOCK": posterior.BLOCK}, {}
    yield posterior.divergence_gradient_kernel, {"BLOCK": posterior.BLOCK}, {}


def compile_kernel(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], dtype: str, architecture: int
) -> dict[str, Any]:
    """Return shared memory and bytes of spilled registers (those in local memory) of a kernel."""
    known = INTEGERS | SCALARS | FLOATS | types
    signature = {name: "constexpr" if name in constants else known.get(name, f"*{dtype}") for name in kernel.arg_names}
    options = {name: value for name, value in constants.items() if name not in signature}
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    spilled = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert spilled is not None, usage
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "shared": compiled.metadata.shared,
        "spilled": int(spilled[1]) + int(spilled[2]),
    }


if __name__ == "__main__":
    config = SeqSetVAEConfig.preset(sys.argv[1], num_codes=43)  # type: ignore[arg-type]
    found = [
        compile_kernel(*kernel, name, int(sys.argv[2]))
        for dtype, name in TRITON_TYPES.items()
        for kernel in kernels(config, dtype)
    ]
    print(json.dumps(found))
