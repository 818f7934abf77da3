"""Several ranks: FSDP2's shards, DDP, and a checkpoint that changes the number of ranks. See tests/shards_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import run_ranks

RANKS = Path(__file__).with_name("shards_ranks.py")


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, RANKS, str(tmp_path), "fsdp2", "nan_on_one_rank")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_equals_torch_and_one_rank(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "fsdp2", "fsdp2_against_one_rank", "nan_on_one_rank")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_with_mixed_precision_and_replicated_shards(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "fsdp2_options")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_checkpoint_goes_to_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    run_ranks(before, RANKS, str(tmp_path), "save")
    run_ranks(after, RANKS, str(tmp_path), "resume")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ddp_and_state_spread_over_its_ranks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "ddp")


@pytest.mark.slow
def test_pipeline_stages_with_an_optimizer_each(tmp_path: Path) -> None:
    run_ranks(2, RANKS, str(tmp_path), "pipeline")
