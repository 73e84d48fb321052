"""What calibration's own pass records is what separate passes find: shares, refitted weights, and no pass more."""

from __future__ import annotations

import copy
import weakref
from collections import Counter

import pytest
import torch
from architecture_cases import CASES, loss_of

from conftest import SMALL, tiny, uneven_kept
from lit_prune import PruningConfig, PruningPlan, find_group_sets, find_model, prune
from lit_prune.calibration.collect import collect_statistics
from lit_prune.calibration.statistics import SKIPPED
from lit_prune.ranking.registry import get_criterion
from lit_prune.repair.hidden_states import COPIES, HiddenStates, Storage, exceeds
from lit_prune.repair.recording import Recording
from lit_prune.repair.redundancy import unexplained_shares
from lit_prune.repair.refit import least_squares
from lit_prune.torch_internals import DispatchMode, tree_leaves

EVERYTHING = 2**40
NAMES = (
    "Llama",
    "GPT-2",
    "Gemma 2",
    "GPT-NeoX / Pythia",
    "T5",
    "BART",
    "BERT, masked language model",
    "Mixtral",
    "Qwen2-MoE",
    "Whisper",
    "ViT, image classification",
)


def case_of(name):
    return next(c for c in CASES if c.name == name)


def recorded(model, batches, loss, limit=EVERYTHING, criterion="fisher"):
    group_sets = find_group_sets(model)
    recording = Recording(model, group_sets, limit, grams=True, outputs=True)
    terms = get_criterion(criterion).terms
    collect_statistics(model, group_sets, batches, loss, terms, recorder=recording)
    recording.finish()
    return group_sets, recording


def both_ways(model, batches, loss, recording):
    """Shares and weights from a recording, and from passes of their own."""
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    shares = [unexplained_shares(model, group_sets, batches, loss, recording=r) for r in (recording, None)]
    weights = [least_squares(model, group_sets, plan, batches, loss, recording=r) for r in (recording, None)]
    return shares, weights


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_gives_the_shares_and_weights_of_passes_of_their_own(name):
    case = case_of(name)
    model = case.build().double()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in case.batch(s).items()} for s in range(3)]
    _, inner = find_model(model)
    # the kernels for all experts at once know no float64
    inner.config._experts_implementation = "eager"
    _, recording = recorded(inner, batches, lambda batch: loss_of(model, batch))
    assert recording.usable
    shares, weights = both_ways(inner, batches, lambda batch: loss_of(model, batch), recording)
    assert_same(*shares)
    assert_same(*weights)
    assert weights[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_what_does_not_fit_is_computed_again(share):
    """With less memory: no matrix and no output, matrices alone, and outputs of some layers."""
    model = tiny("llama").double()
    ids = token_batches()
    loss = causal(model)
    _, everything = recorded(model, ids, loss)
    grams = sum(g.matrix.nbytes for g in everything.grams.grams.values())
    outputs = sum(call.bytes for calls in everything.outputs.values() for call in calls)
    limit = int(share * (grams + outputs))
    _, recording = recorded(model, ids, loss, limit)
    held = sum(call.bytes for calls in recording.outputs.values() for call in calls)
    held += sum(g.matrix.nbytes for g in recording.grams.grams.values()) if recording.grams is not None else 0
    assert held <= limit
    assert (recording.grams is not None) == (grams <= limit)
    shares, weights = both_ways(model, ids, loss, recording)
    assert_same(*shares)
    assert_same(*weights)


def token_batches(count=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SMALL["vocab_size"], (2, 10), generator=generator) for _ in range(count)]


def causal(model):
    return lambda ids: model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "output_wanda"])
def test_a_skipped_batch_is_not_recorded(criterion):
    model = tiny("llama").double()
    ids = token_batches(4)

    def loss(batch):
        found = causal(model)(batch)
        return SKIPPED if batch is ids[1] else found

    _, recording = recorded(model, ids, loss, criterion=criterion)
    shares, weights = both_ways(model, [ids[0], *ids[2:]], causal(model), recording)
    assert_same(*shares)
    assert_same(*weights)


def test_padding_is_not_recorded():
    model = tiny("llama").double()
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:], mask[1, :3] = 0, 0
    ids = token_batches()
    labels = [i.masked_fill(mask == 0, -100) for i in ids]
    batches = [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]
    loss = lambda batch: model(**batch).loss  # noqa: E731
    _, recording = recorded(model, batches, loss)
    assert {int(count) for count in recording.grams.tokens.values()} == {3 * int(mask.sum())}
    shares, weights = both_ways(model, batches, loss, recording)
    assert_same(*shares)
    assert_same(*weights)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_anew_is_not_recorded_again(reentrant):
    model = tiny("llama").double()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().weight.requires_grad_()
    model.train()
    ids = token_batches()
    if reentrant:
        # gradients do not reach weights behind frozen ones there; inputs are all that is asked for
        group_sets = find_group_sets(model)
        recording = Recording(model, group_sets, EVERYTHING, grams=True, outputs=True)
        collect_statistics(
            model, group_sets, ids, causal(model), get_criterion("output_wanda").terms, recorder=recording
        )
        recording.finish()
    else:
        _, recording = recorded(model, ids, causal(model))
    assert recording.usable
    model.eval()
    shares = unexplained_shares(model, find_group_sets(model), ids, causal(model), recording=recording)
    assert_same(shares, unexplained_shares(plain, find_group_sets(plain), ids, causal(plain)))


def test_layers_that_do_not_follow_each_other_end_the_recording_and_not_the_calibration():
    model = tiny("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
    _, recording = recorded(model, token_batches(), causal(model))
    assert not recording.usable
    assert recording.grams is None and not recording.outputs


def counted(model):
    """How often modules were called: the head, and by name everything in decoder layers."""
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("criterion", ["fisher", "output_wanda"])
def test_the_head_runs_only_in_the_check_and_in_calibration(criterion):
    model = tiny("llama")
    calls = counted(model)
    ids = token_batches(4)
    prune(model, ids, causal(model), PruningConfig(criterion, pruning_ratio=0.1, iterations=2))
    # the check runs one batch
    assert calls["lm_head"] == 1 + 2 * len(ids)


def test_a_layer_runs_once_in_calibration_and_at_most_once_and_a_bit_in_the_repair():
    """With room for everything, attention runs for calibration and in the pruned model; layers of the first batch run more."""
    model = tiny("llama")
    calls = counted(model)
    # so few tokens that all outputs fit beside the matrices
    ids = [batch[:1, :4] for batch in token_batches(8)]
    prune(model, ids, causal(model), PruningConfig(pruning_ratio=0.1, iterations=1))
    dense, pruned = len(ids), len(ids)
    extra = 3  # in the check, to compare the layer with its replay, and to see what attention gives
    for number in range(3):
        assert calls[f"model.layers.{number}.self_attn.q_proj"] <= dense + extra + pruned


def test_batches_that_the_choice_of_a_criterion_holds_back_are_recorded_too():
    model = tiny("llama")
    calls = counted(model)
    ids = token_batches(9)
    prune(model, ids, causal(model), PruningConfig("auto", pruning_ratio=0.1, iterations=1))
    # the check, nine batches once, and for each of four candidates those up to the one that is held back
    assert calls["lm_head"] == 1 + 9 + 4 * 8


class Alive(DispatchMode):
    """Counts the tensors of one shape that are alive, each place in memory once."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.most, self.places = torch.Size(shape), 0, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, torch.Tensor) and found.shape == self.shape:
                place = found.data_ptr()
                self.places[place] += 1
                weakref.finalize(found, self.forget, place)
                self.most = max(self.most, len(self.places))
        return result

    def forget(self, place):
        self.places[place] -= 1
        if not self.places[place]:
            del self.places[place]


@pytest.mark.parametrize("repair", [False, True])
def test_hidden_states_are_held_in_so_many_copies_at_most(repair):
    # what attention gives to its projection has another width
    model = tiny("llama", head_dim=6, intermediate_size=40)
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    ids = token_batches(20)
    with Alive((2, 10, SMALL["hidden_size"])) as alive:
        if repair:
            least_squares(model, group_sets, plan, ids, causal(model))
        else:
            unexplained_shares(model, group_sets, ids, causal(model))
    copies = COPIES if repair else 2
    # and a few within the layer that runs
    assert alive.most < (copies + 1) * len(ids)
    assert alive.most > len(ids)


def test_hidden_states_move_to_cpu_memory_by_their_size():
    gigabyte = 2**30
    # of an 8B model, 128 and 1024 sequences of 2048 tokens, on a card of 80 GB
    per_sequence = 2048 * 4096 * 2
    assert not exceeds(100 * per_sequence, 80 * gigabyte)
    assert exceeds(1024 * per_sequence, 80 * gigabyte)
    states = torch.randn(2, 3)
    forced = Storage(offload=True)
    held = HiddenStates(forced, [states])
    # there is nowhere to move to from a CPU
    assert held[0] is states
    assert PruningConfig(offload_hidden_states=True).offload_hidden_states


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_repair_with_hidden_states_in_cpu_memory_is_the_same_on_a_gpu():
    model = tiny("llama").cuda()
    group_sets = find_group_sets(model)
    plan = PruningPlan.from_kept(group_sets, uneven_kept(group_sets))
    ids = [batch.cuda() for batch in token_batches()]
    found = [least_squares(model, group_sets, plan, ids, causal(model), offload=o) for o in (False, True)]
    assert_same(*found)
