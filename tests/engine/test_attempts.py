"""What ranks make together, or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from bireme.parallel.attempts import made_by_all

INSTEAD = "the other way is gone"


@pytest.mark.parametrize(
    "error", [None, RuntimeError("refused"), OSError("refused"), ImportError("refused")]
)
def test_all_have_what_all_made_and_none_what_one_could_not(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = HashStore()

    def made(rank: int) -> int | None:
        def make() -> int:
            if error is not None and rank == 1:
                raise error
            return 10 * rank

        return made_by_all(make, "thing", INSTEAD, (0, 1, 2), rank, store)

    with ThreadPoolExecutor(3) as ranks:
        found = list(ranks.map(made, range(3)))
    assert found == ([0, 10, 20] if error is None else [None] * 3)
    assert caplog.messages == ([] if error is None else [f"{INSTEAD}: refused"])


def test_a_fault_of_our_own_is_not_taken_for_a_refusal() -> None:
    with pytest.raises(ZeroDivisionError):
        made_by_all(lambda: 1 // 0, "thing", INSTEAD, (0,), 0, HashStore())
