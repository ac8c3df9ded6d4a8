"""Operators by abuse: any shape, dtype, stride and value, in a process that may die of it.

A seed is a call: a legal one, of which up to three arguments are spoiled. Allowed is a correct result or an error: of
`kernels.ops` a ValueError in the words of the reference, of an operator itself any exception. A crash, a call that does
not end, and a wrong result are failures.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
import resource
import selectors
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.arguments import with_causal
from attnpress.core.attention import integer_attention
from attnpress.core.call import AttentionCall, Scales
from attnpress.kernels import cpu, ops
from tests.fuzz import kernel
from tests.kernels.agreement import ulps
from tests.kernels.factories import Case

ROOT = Path(__file__).parents[2]
PATIENCE = 100.0
"""Seconds after which a call is taken not to end; the first one of a process also loads torch."""

ROOM = 6 << 30
"""Bytes that a process may ask for beyond what it begins with: no call may bring down the machine."""

COMPARABLE = 4_000_000
"""Products up to which a result is compared with that of the reference."""

REGRESSIONS: list[tuple[int, int]] = [(6, 1), (50, 45), (356, 1)]
"""Seeds that are replayed as tests, each the first and how many: some of all kinds, and each that failed once."""

COMMAND = ("-m", "tests.fuzz.operators")
"""What the other process runs, less the first seed and how many."""

NUMBERS = (0.0, -0.0, -1.0, -1e-30, 1e-45, 1e-30, 1e30, 3e38, math.inf, -math.inf, math.nan)
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
    torch.complex64,
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 5, 7, 16, 18, 64, 256, 260, 516)
HUGE = (2**18, 2**29, 2**31 - 256, 2**31, 2**33, 2**40)

Arguments = list[Any]


def outcomes(first: int, count: int) -> Iterator[str]:
    """What became of so many calls, made by one other process.

    Raises:
        AssertionError: a call crashed, did not end or gave a wrong result; names the seed.
    """
    command = [sys.executable, *COMMAND, str(first), str(count)]
    said: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdout is not None
        lines = _lines(child.stdout)
        try:
            for seed in range(first, first + count):
                for line in lines:
                    said.append(line)
                    if line.startswith(f"{seed} "):
                        break
                else:
                    raise AssertionError(f"seed {seed}: its process ended with {child.wait(10)}\n" + "\n".join(said))
                yield said[-1].split()[1]
                said.clear()
        except TimeoutError:
            raise AssertionError(f"seed {seed}: did not end\n" + "\n".join(said)) from None
        finally:
            child.kill()


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come; a TimeoutError where none comes for PATIENCE."""
    selector = selectors.DefaultSelector()
    selector.register(stream, selectors.EVENT_READ)
    rest = b""
    while selector.select(PATIENCE):
        part = os.read(stream.fileno(), 1 << 16)  # past the stream's own buffer, of which a selector knows nothing
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
        if not part:
            return
    raise TimeoutError


def replay(seed: int) -> str:
    """One call in this process; returns how it ended: "refused" or "correct", and at which entry.

    Raises:
        AssertionError: a wrong result, or an error that is not ours.
    """
    rng = random.Random(seed)
    entry, abuse = rng.choice((("attention", _attention), ("packed", _packed), ("operator", _operator)))
    return f"{entry}:{abuse(rng, seed)}"


def _attention(rng: random.Random, seed: int) -> str:
    count = rng.choice((1, 1, 2, 3))
    case = _spoiled(rng, kernel.draw(rng, seed), count)
    compiled = _result(lambda: ops.attention(case, backend="cpu"))
    reference = _result(lambda: ops.attention(case, backend="reference"))
    return _judged(compiled, reference, _products(case.query, case.key), count > 1)


def _packed(rng: random.Random, seed: int) -> str:
    case = kernel.draw_packed(rng, seed)
    bounds = kernel.draw_bounds(rng, case.query.shape[2])
    count, bad_bounds = rng.choice((0, 0, 1, 1, 2)), rng.random() < 0.6
    case = _spoiled(rng, case, count)
    bounds = spoil(rng, bounds) if bad_bounds else bounds
    compiled, reference = (
        _result(functools.partial(ops.attention, case.with_(bounds=bounds), backend=backend))
        for backend in ("cpu", "reference")
    )
    return _judged(compiled, reference, _products(case.query, case.key), count + bad_bounds > 1)


def _operator(rng: random.Random, seed: int) -> str:
    name = rng.choice(("attention", "attention", "attention_packed", "attention_integers"))
    case = kernel.draw_packed(rng, seed) if name == "attention_packed" else kernel.draw(rng, seed)
    arguments: Arguments = list(ops.compiled_arguments(case))
    if name == "attention_packed":
        arguments[3] = kernel.draw_bounds(rng, case.query.shape[2])
    for place in rng.sample(range(len(arguments)), rng.choice((1, 1, 2, 3))):
        arguments[place] = spoil(rng, arguments[place])
    try:
        found = getattr(torch.ops.attnpress, name)(*arguments)
    except Exception:
        return "refused"
    # A threshold cannot be got back from theta, nor can which heads have no tail; a packed call is compared elsewhere.
    told = arguments[10] != "threshold" and len(arguments) <= cpu.TAIL_AT
    if name == "attention" and told and _products(*arguments[:2]) <= COMPARABLE:
        expected = _reference(arguments)
        assert ulps(found, expected) <= 1, f"differs from the reference by {ulps(found, expected)} ulps"
    return "correct"


def _reference(arguments: Arguments) -> Tensor:
    """What an operator's arguments mean, through the reference."""
    query, key, value, valid, causal, scaling, q_scale, k_scale, v_scale, cutoff, rule, sparsity, mode = arguments[:13]
    q_max, k_max, v_max, p_max, smooth_key, power_of_two = arguments[13:]
    spec = AttentionSpec(
        q=TensorSpec(q_max.bit_length() + 1, "token" if q_scale is None else "head", power_of_two=power_of_two),
        k=TensorSpec(k_max.bit_length() + 1),
        v=TensorSpec(v_max.bit_length() + 1),
        p=ProbsSpec(max(2, p_max.bit_length()), mode.partition("_")[0], p_max == 1, mode.endswith("renormalized")),
        rule=rule, sparsity=sparsity, smooth_key=smooth_key,
    )  # fmt: skip
    allowed = with_causal(valid, query, key) if causal else valid
    scales = Scales(q=q_scale, k=k_scale, v=v_scale)
    return integer_attention(AttentionCall(query, key, value, allowed, scales, cutoff, spec, scaling)).output


Result = Tensor | ValueError | MemoryError


def _result(call: Callable[[], Tensor]) -> Result:
    try:
        return call()
    except (ValueError, MemoryError) as error:
        return error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "bad_alloc" in str(error):
            return MemoryError(str(error))
        raise


def _judged(compiled: Result, reference: Result, products: int, several: bool) -> str:
    if isinstance(compiled, MemoryError):
        return "refused"
    if isinstance(compiled, ValueError):
        # It takes less than the reference, and may see another fault first where there are several.
        own = "backend 'cpu'" in str(compiled) or "do not fit together" in str(compiled)
        alike = str(compiled) == str(reference) or (several and isinstance(reference, ValueError))
        assert own or alike, f"{compiled!r}, but the reference: {reference!r}"
        return "refused"
    assert isinstance(reference, Tensor), f"taken, but the reference: {reference!r}"
    if products <= COMPARABLE:
        assert ulps(compiled, reference) <= 1, f"differs from the reference by {ulps(compiled, reference)} ulps"
    return "correct"


def _products(query: Tensor, key: Tensor) -> int:
    return query.numel() * (key.shape[2] if key.dim() == 4 else 0)


def _spoiled(rng: random.Random, case: Case, count: int) -> Case:
    names = ("query", "key", "value", "valid", "cutoff", "scaling", "q", "k", "v")
    for name in rng.sample(names, count):
        if name in "qkv":
            scales = dataclasses.replace(case.scales, **{name: spoil(rng, getattr(case.scales, name))})
            case = case.with_(scales=scales)
        else:
            case = case.with_(**{name: spoil(rng, getattr(case, name))})
    return case if _products(case.query, case.key) <= COMPARABLE else kernel.draw(rng, 0)


def spoil(rng: random.Random, x: Any) -> Any:
    """Something else in place of an argument: of its own kind, but for a tensor that may be left out."""
    match x:
        case bool():
            return not x
        case int():
            return rng.choice((-1, 0, 1, 2, 3, 7, 8, 63, 127, 128, 255, 256, 2**31, 2**40, -(2**63)))
        case float():
            return rng.choice((*NUMBERS, 2.0**-32, 2.0**32, 1.0))
        case str():
            return rng.choice(("", "mass", "nm", "relative", "topk", "unit", "row", "x" * 999))
        case Tensor():
            return rng.choice((_values, _values, _dtype, _shape, _strides, _huge, _place))(rng, x)
    return torch.ones([rng.choice(SIZES[:9]) for _ in range(rng.randint(0, 4))])


def _values(rng: random.Random, x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return torch.randint(0, 256, x.shape, dtype=torch.uint8).view(torch.bool)
    x = x.clone(memory_format=torch.contiguous_format)
    numbers = NUMBERS if x.is_floating_point() else (-(2**63), -1, 0, 1, 2**62)
    if rng.random() < 0.5 or x.numel() == 0:
        return x.fill_(torch.tensor(rng.choice(numbers)).to(x.dtype))
    x.view(-1)[rng.randrange(x.numel())] = torch.tensor(rng.choice(numbers)).to(x.dtype)
    return x


def _dtype(rng: random.Random, x: Tensor) -> Tensor:
    dtype = rng.choice(DTYPES)
    if dtype.itemsize == x.element_size() and x.is_contiguous() and rng.random() < 0.3:
        return x.view(dtype)
    return x.to(dtype)


def _shape(rng: random.Random, x: Tensor) -> Tensor:
    sizes = list(x.shape)
    kind = rng.choice(("less", "more", "size", "size", "any"))
    if kind == "less" and sizes:
        return x.select(rng.randrange(len(sizes)), 0) if 0 not in sizes else x.flatten()
    if kind == "more":
        return x.unsqueeze(rng.randint(0, len(sizes)))
    if kind == "size" and sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice(SIZES)
    else:
        sizes = [rng.choice(SIZES[:8]) for _ in range(rng.randint(0, 5))]
    return torch.zeros(sizes, dtype=x.dtype)


def _strides(rng: random.Random, x: Tensor) -> Tensor:
    if x.dim() == 0 or x.numel() == 0:
        return x
    kind = rng.choice(("permuted", "strided", "one", "every other"))
    if kind == "permuted":
        return x.permute(*rng.sample(range(x.dim()), x.dim()))
    if kind == "one":
        return x[..., :1].expand_as(x)
    if kind == "every other":
        return x.repeat_interleave(2, -1)[..., ::2]
    flat = torch.randint(0, 3, (4096,)).to(x.dtype)
    strides = [rng.choice((0, 0, 1, 2)) for _ in x.shape]
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    return flat.as_strided(x.shape, strides, rng.randint(0, 1000)) if reach < 3000 else x


def _huge(rng: random.Random, x: Tensor) -> Tensor:
    if x.dim() == 0 or x.numel() == 0:
        return x
    dim = rng.randrange(x.dim())
    return x.narrow(dim, 0, 1).expand([rng.choice(HUGE) if i == dim else size for i, size in enumerate(x.shape)])


def _place(rng: random.Random, x: Tensor) -> Tensor:
    if rng.random() < 0.5:
        return x.to("meta")
    return x.clone().requires_grad_() if x.is_floating_point() else x


def main(first: int, count: int) -> None:
    """Make the calls, and say how each ended."""
    cpu.load()
    torch.set_num_threads(2)
    began = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (began + ROOM, began + ROOM))
    for seed in range(first, first + count):
        try:
            print(seed, replay(seed), flush=True)
        except Exception:
            traceback.print_exc(limit=-3)
            sys.exit(f"seed {seed}: a wrong result, or an error of the wrong kind")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
