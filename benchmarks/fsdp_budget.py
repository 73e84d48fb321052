"""Memory of a process that trains and prunes a model of Llama 3 70B's shape under FSDP2, phase by phase.

What lit_prune and the model allocate is counted while they run: on the meta device, where tensors have sizes and no values.
Two blocks stand for all of them, as one is held at a time; what grows with their number is counted with three as well and
goes on in a straight line. What FSDP2 holds of its own, and what a process has of what is sharded, is worked out.

    python benchmarks/fsdp_budget.py --output docs/fsdp_budget.json      # and the table, for docs/fsdp.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from allocations import Allocations
from common import SHAPES, llama_config, markdown
from results import write_json
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_prune import PruningPlan, find_group_sets
from lit_prune.calibration.collect import collect_statistics
from lit_prune.groups import count_parameters
from lit_prune.ranking.registry import get_criterion
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "llama3_70b_fsdp.yaml"
# bytes of a bfloat16, of a float32
HALF, FULL = 2, 4


def shaped(size: str, layers: int) -> nn.Module:
    """Return a Llama of some shape without values, with fewer decoder layers; activations are recomputed in training."""
    hidden, width, _, *rest = SHAPES[size]
    config = llama_config((hidden, width, layers, *rest))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def counted(run: Callable[[], object]) -> int:
    """The most bytes that are allocated on top while something runs."""
    with Allocations() as found:
        run()
        return found.peak


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def dropped_by_unit(model: Any) -> None:
    """Let the gradients of a block go when the next one's come, as FSDP2 does once they are scattered."""
    units = [*model.model.layers, model]
    unit_of = {id(p): number for number, unit in reversed(list(enumerate(units))) for p in unit.parameters()}
    held: dict[int, list[nn.Parameter]] = {}

    def hook(parameter: nn.Parameter) -> None:
        unit = unit_of[id(parameter)]
        for other in [u for u in held if u not in (unit, len(units) - 1)]:
            for earlier in held.pop(other):
                earlier.grad = None
        held.setdefault(unit, []).append(parameter)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)


def training_step(size: str, layers: int, tokens: int) -> int:
    model = shaped(size, layers).train()
    dropped_by_unit(model)
    return counted(lambda: loss_of(model)(batch_of(tokens)).backward())


def calibration(size: str, layers: int, tokens: int, importance: Sequence[str]) -> int:
    model = shaped(size, layers).train()
    sets = find_group_sets(model)
    terms = [term for name in importance for term in get_criterion(name).terms]
    return counted(lambda: collect_statistics(model, sets, [batch_of(tokens)], loss_of(model), terms))


def compensation(size: str, tokens: int, batches: int) -> int:
    model = shaped(size, 2)
    data = [batch_of(tokens) for _ in range(batches)]
    return counted(lambda: unexplained_shares(model, find_group_sets(model), data, loss_of(model)))


def repair(size: str, tokens: int, batches: int, ratio: float) -> int:
    model = shaped(size, 2)
    sets, data = find_group_sets(model), [batch_of(tokens) for _ in range(batches)]
    # the first block keeps its channels: as wide as any block may stay
    kept = [list(range(s.size if n < 2 else int(s.size * (1 - 2 * ratio)))) for n, s in enumerate(sets)]
    kept[0].pop()
    plan = PruningPlan.from_kept(sets, kept)
    return counted(lambda: least_squares(model, sets, plan, data, loss_of(model)))


def batch_of(tokens: int) -> Tensor:
    return torch.zeros(1, tokens, dtype=torch.long, device="meta")


def in_line(measure: Callable[[int], int], layers: int) -> int:
    """What grows with the number of layers, from two and three of them."""
    two, three = measure(2), measure(3)
    return two + (three - two) * (layers - 2)


def budget(size: str = "70B", *, ranks: int, tokens: int, batches: int, ratio: float, importance: Sequence[str]) -> Any:
    """Bytes of a process, by phase.

    Args:
        size: Name of the shape.
        ranks: Number of processes.
        tokens: Tokens of a sequence, one a process and batch.
        batches: Calibration batches of a process.
        ratio: Fraction of the parameters that is removed.
        importance: Criteria.
    """
    layers = SHAPES[size][2]
    total, one = count_parameters(shaped(size, layers)), shaped(size, 1)
    block = count_parameters(one.model.layers[0])
    # a refitted weight for each consumer
    refitted = sum(p.numel() for n, p in one.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight")))
    largest = max(p.numel() for p in one.model.layers[0].parameters())
    shard = HALF * total // ranks
    numbers = {
        "parameters": total,
        "block": block,
        "weights": shard,
        "gradients": shard,
        "moments": 2 * shard,
        # this block and the next one, what the next one is gathered into, and what gradients are scattered from
        "fsdp_blocks": 4 * HALF * block,
        "fsdp_ends": HALF * (total - layers * block),
        "step": in_line(lambda n: training_step(size, n, tokens), layers),
        "calibration": in_line(lambda n: calibration(size, n, tokens, importance), layers),
        "block_whole": HALF * block,
        "compensation": compensation(size, tokens, batches),
        "repair": repair(size, tokens, batches, ratio),
        "refitted": HALF * refitted * layers // ranks,
        # a parameter whole and what stays of it; of all that leaves the share of this process, until all is cut
        "surgery": 2 * HALF * largest + int(ratio * shard),
        "surgery_moments": int(ratio * 2 * shard),
    }
    return {"size": size, "ranks": ranks, "tokens": tokens, "batches": batches, "bytes": numbers}


def totals(numbers: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """What every phase takes on top of the state, and in all at step 0 and in the middle of training."""
    n = numbers
    forward = n["fsdp_blocks"] + n["fsdp_ends"]
    on_top = {
        "training step": n["step"] + forward,
        "calibration": n["calibration"] + forward,
        "compensation": n["compensation"] + n["block_whole"],
        "repair": n["repair"] + n["block_whole"] + n["refitted"],
        "surgery": n["surgery"] + n["refitted"],
    }
    result = {}
    for phase, extra in on_top.items():
        # gradients are let go before a cut
        start = n["weights"] if phase != "training step" else 0
        middle = n["weights"] + n["moments"] + (n["gradients"] if phase == "training step" else 0)
        more = n["surgery_moments"] if phase == "surgery" else 0
        result[phase] = (extra, start + extra if start else middle + extra, middle + extra + more)
    return result


def table(result: Mapping[str, Any]) -> str:
    """The table of docs/fsdp.md, in 10⁹ bytes."""
    rows = [(phase, *(f"{value / 1e9:.1f}" for value in values)) for phase, values in totals(result["bytes"]).items()]
    return markdown(("GB a GPU", "on top", "at step 0", "in the middle of training"), rows)


def recipe() -> dict[str, Any]:
    """What the recipe says."""
    read = yaml.safe_load(RECIPE.read_text())
    pruning = read["pruning"]
    return {
        "ranks": read["trainer"]["strategy"]["init_args"]["data_parallel_size"],
        "tokens": read["data"]["block_size"],
        "batches": pruning["calibration_batches"],
        "ratio": pruning["pruning_ratio"],
        "importance": list(pruning["importance"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/fsdp_budget.json"))
    options = parser.parse_args()
    result = budget(**recipe())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(table(result))


if __name__ == "__main__":
    main()
