"""Compiles the GPU kernels to PTX for compute capability 9.0, without a GPU.

    python -m tests.kernels.ptx

Prints JSON: the PTX of all kernels of a call, by case. In a process of its own, since Triton must not have been told to
interpret.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnpress.kernels.triton.launch import KernelCall, Launch, prepare

TARGET = GPUTarget("cuda", 90, 32)

CASES: dict[str, dict[str, Any]] = {
    "relative, padding": {"mask": (2, 1, 1, 200)},
    "threshold, unit, token": {
        "rule": "threshold",
        "mode": "unit",
        "dim": 128,
        "token": True,
        "mask": (1, 1, 200, 200),
    },
    "topk, causal, 4 bits": {"rule": "topk", "causal": True, "dim": 32, "bits": 4},
}


def make_call(
    *, rule: str = "relative", mode: str = "row", dim: int = 64, bits: int = 8, token: bool = False,
    causal: bool = False, mask: tuple[int, ...] | None = None, dtype: torch.dtype = torch.bfloat16,
) -> KernelCall:  # fmt: skip
    """A call of usual shapes; its values do not matter."""
    query, key = torch.zeros(2, 4, 200, dim, dtype=dtype), torch.zeros(2, 2, 200, dim, dtype=dtype)
    valid = None if mask is None else torch.ones(mask, dtype=torch.bool)
    q_scale, scale = torch.ones(1, 4, 1, 1), torch.ones(1, 2, 1, 1)
    top = 2 ** (bits - 1) - 1
    return KernelCall(
        query, key, key, valid, causal, 0.125, None if token else q_scale, scale, scale,
        None if rule == "topk" else torch.ones(4), rule, 0.5, mode, top, top, top, 2 * top + 1, False, False,
    )  # fmt: skip


def ptx_of(launch: Launch) -> str:
    """PTX of a launch as Triton would compile it on a GPU of that capability, tensors aligned to 16 bytes."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        free = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (free and value == 1):  # Triton makes a constant of a 1
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (free and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, aligned), target=TARGET, options=launch.options()
    )
    text: str = compiled.asm["ptx"]
    return text


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + {
            torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
            torch.uint8: "u8", torch.int32: "i32",
        }[value.dtype]  # fmt: skip
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    """Compile all cases, and print their PTX."""
    found = {
        name: "".join(ptx_of(launch) for launch in prepare(make_call(**options))[0]) for name, options in CASES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
