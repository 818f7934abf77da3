"""Every rule in every state format: the same bits from every implementation, and what the formats promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.kernels import STATE_FORMATS, AdamScalars, Rounding, State, available_implementations, native, threads
from offload.kernels.codec import Rows, join_master, random_bits, read_state, split_master, write_state
from offload.kernels.state import BLOCK_NUMEL, num_blocks
from tests.kernels.states import RULES, assert_same_bits, clone, copy_state, every_case, is_possible, make_case, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = [name for name in available_implementations() if name != "torch"]


@pytest.mark.parametrize("rule", RULES)
def test_every_format_gives_the_same_bits(rule: str) -> None:
    for case in every_case(3 * BLOCK_NUMEL + 77, [rule]):
        expected = run(clone(case), "torch")
        for name in OTHERS:
            assert_same_bits(run(clone(case), name), expected, name)


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("adamw", "adam", "amsgrad")])
def test_every_dtype_gives_the_same_bits(rule: str) -> None:
    """Gradients of any dtype in every format, and parameters of any dtype in fp32; Adam's are in test_bits.py."""
    cases = [make_case(rule, "fp32", 333, grad_dtype=g, param_dtype=p) for g in FLOATS for p in (None, *FLOATS)]
    cases += [make_case(rule, name, 333, grad_dtype=g) for name in STATE_FORMATS[1:] for g in FLOATS]
    for case in cases:
        expected = run(clone(case), "torch")
        for name in OTHERS:
            assert_same_bits(run(clone(case), name), expected, name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rule=st.sampled_from(list(RULES)),
    state_format=st.sampled_from(STATE_FORMATS),
    numel=st.integers(1, 4099),
    grad_dtype=st.sampled_from(FLOATS),
    offset=st.integers(0, 17),
    seed=st.integers(0, 2**32),
)
def test_same_bits_for_any_size_and_offset(
    rule: str, state_format: str, numel: int, grad_dtype: torch.dtype, offset: int, seed: int
) -> None:
    if not is_possible(rule, state_format):
        return
    case = make_case(rule, state_format, numel, grad_dtype=grad_dtype, seed=seed)
    expected = run(clone(case), "torch")
    for name in OTHERS:
        ours = clone(case)
        ours.state = copy_state(case.state, offset)
        assert_same_bits(run(ours, name), expected, name)


@pytest.mark.slow
@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("rule", ["adamw", "nesterov"])
def test_same_bits_for_every_size(rule: str, state_format: str) -> None:
    fast = [name for name in OTHERS if name != "numba"]
    for numel in range(1, 4100):
        case = make_case(rule, state_format, numel, seed=numel)
        expected = run(clone(case), "torch")
        for name in fast if numel % 16 else OTHERS:
            assert_same_bits(run(clone(case), name), expected, name)


@pytest.mark.parametrize("chunk_numel", [128, 1000, 4096])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_same_bits_for_every_cut(state_format: str, chunk_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.kernels import numba_kernel

    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 0)
    monkeypatch.setattr(native, "CHUNK_NUMEL", chunk_numel)
    monkeypatch.setattr(numba_kernel, "CHUNK_NUMEL", chunk_numel)
    case = make_case("adamw", state_format, 20_001)
    expected = run(clone(case), "torch")
    for name, num_threads in itertools.product(OTHERS, (1, 3)):
        assert_same_bits(run(clone(case), name, num_threads=num_threads), expected, name)


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_parts_give_the_bits_of_the_whole(state_format: str) -> None:
    """Random bits belong to the element's number, not to its place in a call."""
    whole = make_case("adamw", state_format, 1000)
    parts = clone(whole)
    rounding = Rounding.at_step(seed=1, step=2, first_index=2**32 - 500)
    whole.scalars, whole.roundings = whole.scalars[1:2], [rounding]
    run(whole, "torch")
    for begin, numel in ((0, 256), (256, 512), (768, 232)):
        part = clone(parts)
        part.state, part.grad = parts.state.narrow(begin, numel), parts.grad[begin : begin + numel]
        part.param = None if parts.param is None else parts.param[begin : begin + numel]
        part.scalars = whole.scalars
        part.roundings = [Rounding(rounding.key, rounding.first_index + begin)]
        run(part, OTHERS[0])
    assert_same_bits(parts, whole)


# ---- the master in two halves


def all_kinds_of_floats() -> torch.Tensor:
    """Every upper half with lower halves around every boundary, ties included: each exponent, sign, NaN, infinity."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] * 2**16
    low = torch.tensor([0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xABCD, 0xFFFE, 0xFFFF])
    return (high + low).to(torch.int32).flatten().view(torch.float32)


def test_param_and_remainder_and_one_sign_are_the_master() -> None:
    master = all_kinds_of_floats()
    high, remainder, is_tie = split_master(master)
    param = high.view(torch.bfloat16)
    rounded = master.bfloat16()
    is_nan = master.isnan()
    assert torch.equal(high[~is_nan], rounded.view(torch.int16)[~is_nan]), "the parameter is the rounded master"
    assert bool(param[is_nan].isnan().all())
    second = torch.where(is_tie, -1.0, 1.0)
    joined = join_master(param, remainder, second)
    assert torch.equal(joined.view(torch.int32)[~is_nan], master.view(torch.int32)[~is_nan])
    assert bool(joined[is_nan].isnan().all())
    assert 0 < int(is_tie.sum()) < master.numel() / 12, "one value of each even upper half"
    without = join_master(param, remainder, None)
    off_by = (without.view(torch.int32) - master.view(torch.int32))[~is_nan]
    assert torch.equal(off_by, -is_tie[~is_nan].to(torch.int32)), "without a sign to spare, a tie loses one unit"


@pytest.mark.parametrize("implementation", available_implementations())
@pytest.mark.parametrize("rule", ["adamw", "amsgrad", "adagrad"])
def test_split16_is_fp32_bit_for_bit(rule: str, implementation: str) -> None:
    """From every kind of master, ties included, through some steps."""
    masters = all_kinds_of_floats()
    masters = masters[~masters.isnan()][::3]
    fp32 = make_case(rule, "fp32", masters.numel(), is_adversarial=False)
    assert fp32.param is not None
    fp32.state.master.copy_(masters)
    fp32.param.copy_(masters)
    fp32.grad.mul_(1e-30)  # steps of all sizes down to none at all
    split = clone(make_case(rule, "split16", masters.numel(), is_adversarial=False))
    split.grad, split.param = fp32.grad.clone(), fp32.param.clone()
    write_state(
        split.state, split.param, Rows(masters, fp32.state.first, fp32.state.second, fp32.state.max_second), None
    )
    run(fp32, implementation)
    run(split, implementation)
    assert split.param is not None
    rows = read_state(split.state, split.param)
    for ours, theirs in ((rows.master, fp32.state.master), (rows.first, fp32.state.first), (split.param, fp32.param)):
        if ours is not None and theirs is not None:
            integer = torch.int32 if ours.itemsize == 4 else torch.int16
            assert bool(((ours.view(integer) == theirs.view(integer)) | (ours.isnan() & theirs.isnan())).all())


# ---- rounding of moments


def test_random_bits_are_even_and_independent() -> None:
    bits = random_bits(2**16, Rounding.at_step(seed=7, step=1), torch.device("cpu"))
    other = random_bits(2**16, Rounding.at_step(seed=7, step=2), torch.device("cpu"))
    for shift in range(32):
        one, two = (bits >> shift) & 1, (other >> shift) & 1
        assert abs(float(one.float().mean()) - 0.5) < 0.01
        assert abs(float((one == two).float().mean()) - 0.5) < 0.01, "steps are independent"
        assert abs(float((one[1:] == one[:-1]).float().mean()) - 0.5) < 0.01, "and so are neighbours"
        assert abs(float((one == (bits >> ((shift + 16) % 32)) & 1).float().mean()) - 0.5) < 0.01, "and both moments"


def state_of(state_format: str, numel: int) -> State:
    return make_case("adamw", state_format, numel).state


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_stored_moments_are_right_on_average(state_format: str) -> None:
    """The mean over many steps' random bits is the value, to 4.5 standard errors."""
    numel, num_draws = 2 * BLOCK_NUMEL, 1000
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).exp()
    second = torch.rand(numel, generator=generator) + 0.01
    state, param = state_of(state_format, numel), torch.zeros(numel, dtype=torch.bfloat16)
    draws = []
    for step in range(num_draws):
        write_state(state, param, Rows(torch.zeros(numel), first, second), Rounding.at_step(seed=0, step=step + 1))
        rows = read_state(state, param)
        assert rows.first is not None and rows.second is not None  # noqa: PT018  for the type checker
        draws.append(torch.stack([rows.first, rows.second]))
    drawn = torch.stack(draws).double()
    exact = torch.stack([first, second]).double()
    scale = exact.view(2, 2, BLOCK_NUMEL).abs().amax(2).repeat_interleave(BLOCK_NUMEL, 1) / 127**2
    gap = exact.abs() * 2**-7 if state_format == "bf16" else 2 * (exact.abs() * scale).sqrt() + scale
    # Where rounding up is rare it may not have happened at all: as if it had, once.
    standard_error = drawn.std(0).clamp(min=gap / num_draws**0.5) / num_draws**0.5
    error, allowed = (drawn.mean(0) - exact).abs(), 4.5 * standard_error
    assert bool((error <= allowed).all())


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_what_was_read_is_stored_unchanged(state_format: str) -> None:
    """Without random bits, to the last bit in bf16 and to a unit of the scale's last place in int8."""
    state, param = state_of(state_format, 1000), torch.zeros(1000, dtype=torch.bfloat16)
    rows = read_state(state, param)
    assert rows.first is not None
    finite = torch.where(rows.first.isfinite(), rows.first, 0.0)
    write_state(state, param, Rows(rows.master, finite, finite.abs()), None)
    once = read_state(state, param)
    write_state(state, param, once, None)
    twice = read_state(state, param)
    for a, b in ((once.first, twice.first), (once.second, twice.second)):
        assert a is not None and b is not None  # noqa: PT018
        torch.testing.assert_close(a, b, rtol=0 if state_format == "bf16" else 3e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_seen_in_int8(bad: float) -> None:
    """Their block, and no other, becomes NaN."""
    state, param = state_of("int8", 3 * BLOCK_NUMEL), torch.zeros(3 * BLOCK_NUMEL, dtype=torch.bfloat16)
    first = torch.ones(3 * BLOCK_NUMEL)
    first[BLOCK_NUMEL + 5] = bad
    write_state(state, param, Rows(torch.zeros_like(first), first, torch.ones_like(first)), None)
    rows = read_state(state, param)
    assert rows.first is not None
    is_nan = rows.first.isnan().view(3, BLOCK_NUMEL)
    assert is_nan.any(1).tolist() == is_nan.all(1).tolist() == [False, True, False]


def test_a_small_second_moment_never_becomes_zero() -> None:
    """It divides: a small gradient beside a large one would be a huge step."""
    state, param = state_of("int8", BLOCK_NUMEL), torch.zeros(BLOCK_NUMEL, dtype=torch.bfloat16)
    second = torch.full((BLOCK_NUMEL,), 1e-20)
    second[0], second[1] = 1.0, 0.0
    for step in range(1, 20):
        write_state(state, param, Rows(torch.zeros_like(second), second, second), Rounding.at_step(0, step))
        stored = read_state(state, param).second
        assert stored is not None
        assert float(stored[1]) == 0.0
        assert bool((stored[2:] > 0).all())


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp8"}, "state_format='fp8' is unknown; known are fp32, split16, bf16, int8"),
        ({"second": None}, r"rule 'adam' with state_format='int8' keeps \['first', 'first_scale', 'second', "),
        ({"max_second": torch.zeros(300)}, r"not \['first', 'first_scale', 'max_second', "),
        ({"first_scale": torch.zeros(2)}, "first_scale has 2 elements, not 3, one a block"),
    ],
)
def test_state_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    case = make_case("adamw", "int8", 300)
    fields = {name: getattr(case.state, name) for name in State.__slots__} | change
    case.state = State(**fields)
    with pytest.raises(ValueError, match=message):
        run(case, "torch")


@pytest.mark.parametrize("param_dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("state_format", STATE_FORMATS[1:])
def test_compact_formats_need_bfloat16_parameters(state_format: str, param_dtype: torch.dtype | None) -> None:
    case = make_case("adamw", state_format, 10, param_dtype=param_dtype)
    with pytest.raises(ValueError, match=r"keeps half of the master in a bfloat16 parameter, not in .*; use bfloat16"):
        run(case, "torch")


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_same_bits_on_the_emulated_device(sim: object, state_format: str) -> None:
    case = make_case("adamw", state_format, 1000)
    expected = run(clone(case), "torch")
    assert case.param is not None
    on_device = clone(case)
    on_device.state = State(state_format, *(None if t is None else t.to("sim") for t in case.state.tensors()))
    on_device.grad, on_device.param = case.grad.to("sim"), case.param.to("sim")
    for scalars, rounding in zip(case.scalars, case.roundings, strict=True):
        from offload.kernels import update

        update(on_device.state, on_device.grad, on_device.param, scalars=scalars, rounding=rounding)
    on_device.state = State(state_format, *(None if t is None else t.cpu() for t in on_device.state.tensors()))
    on_device.param = on_device.param.cpu()
    assert_same_bits(on_device, expected)


def test_blocks() -> None:
    assert [num_blocks(numel) for numel in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert AdamScalars.rule == "adam"
