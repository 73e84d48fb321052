"""What models are run on to measure them: made-up tokens for every kind of head, one batch where there are none."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from architecture_cases import BART_SMALL, CASES, ENCODER, MAMBA_SMALL, T5_SMALL, loss_of
from torch.utils.flop_counter import FlopCounterMode

from conftest import SMALL
from lit_prune import Budget, PruningConfig, find_group_sets, prune
from lit_prune.budgets.flops import count_flops
from lit_prune.budgets.memory import count_memory
from lit_prune.budgets.workloads import Workload, takes_tokens
from lit_prune.errors import BudgetError

ENDS = {"eos_token_id": 2}
PAIRS = ("T5", "mT5", "BART", "mBART", "Pegasus", "Marian", "M2M100 / NLLB")
IMAGES_AND_TEXT = ("CLIP", "SigLIP")
MODELS = {
    "T5ForConditionalGeneration": (transformers.T5Config, {**T5_SMALL, **ENDS}, ("prefill", "decode", "train")),
    "T5Model": (transformers.T5Config, {**T5_SMALL, **ENDS}, ("prefill", "decode", "train")),
    "T5ForSequenceClassification": (transformers.T5Config, {**T5_SMALL, **ENDS}, ("prefill", "train")),
    "MarianMTModel": (transformers.MarianConfig, BART_SMALL, ("prefill", "decode", "train")),
    "BartForSequenceClassification": (transformers.BartConfig, {**BART_SMALL, **ENDS}, ("prefill", "train")),
    "BertForTokenClassification": (transformers.BertConfig, ENCODER, ("prefill", "train")),
    "BertForSequenceClassification": (transformers.BertConfig, ENCODER, ("prefill", "train")),
    "MambaForCausalLM": (transformers.MambaConfig, {**SMALL, **MAMBA_SMALL}, ("prefill", "decode", "train")),
}


def case(name: str):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("name", MODELS)
def test_every_phase_of_every_head_runs(name):
    config, options, phases = MODELS[name]
    workload = Workload(getattr(transformers, name)(config(**options)), 2, 16)
    workload.forward()
    for phase in phases:
        with workload.step(phase) as step:
            step()
            step()


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_of_decoding_runs_the_decoder_alone(name):
    model = case(name).build()
    ran = []
    model.get_encoder().register_forward_hook(lambda *_: ran.append("encoder"))
    with Workload(model, 1, 8).step("decode") as step:
        assert ran.pop() == "encoder" and not ran
        step()
    assert not ran


@pytest.mark.parametrize("name", PAIRS + IMAGES_AND_TEXT)
def test_budgets_of_models_with_two_inputs_are_met(name):
    model, batch = case(name).build(), case(name).batch(0)
    budget = Budget(flops="90%", memory="95%", length=16)
    _, plan = prune(model, [batch], lambda b: loss_of(model, b), PruningConfig(budget=budget, iterations=1))
    for row in plan.info["budgets"]:
        assert row["measured"] == pytest.approx(row["predicted"]) and row["measured"] <= row["target"] < row["dense"]


@pytest.mark.parametrize("name", IMAGES_AND_TEXT)
def test_models_with_two_embeddings_are_run_on_a_batch(name):
    model, batch = case(name).build(), case(name).batch(0)
    assert not takes_tokens(model)
    with pytest.raises(BudgetError, match="calibration batch"):
        Workload(model, 1, 16)
    workload = Workload(model, 1, 16, lambda: contextlib.nullcontext(lambda: loss_of(model, batch)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(case(name).build("eager"), batch)
    assert count_flops(workload) == counter.get_total_flops()


def test_models_that_read_images_beside_a_text_are_run_on_tokens():
    assert takes_tokens(case("Gemma 3 with images").build())


def test_the_length_matters_where_something_grows_with_it():
    bert, llama = case("BERT, masked language model").build(), case("Llama").build()
    assert count_memory(Workload(bert, 1, 1000)) == sum(4 * p.numel() for p in bert.parameters())
    PruningConfig(budget=Budget(memory="80%")).check(bert, find_group_sets(bert))
    for model, limits in ((bert, {"flops": "80%"}), (llama, {"memory": "80%"}), (llama, {"flops": "80%"})):
        with pytest.raises(BudgetError, match="64 positions"):
            PruningConfig(budget=Budget(**limits)).check(model, find_group_sets(model))


POSITIONS = {"RoBERTa, token classification": 63, "XLM-RoBERTa": 63, "BART": 64, "OPT": 64}


@pytest.mark.parametrize(("name", "most"), POSITIONS.items())
def test_as_long_as_the_positions_reach(name, most):
    model = case(name).build()
    Workload(model, 1, most).forward()
    with pytest.raises(BudgetError, match=f"{most} positions"):
        Workload(model, 1, most + 1).forward()
