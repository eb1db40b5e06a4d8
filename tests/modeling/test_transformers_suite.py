"""transformers' own tests of models and configurations, for every model class of every family."""

import inspect
import unittest

import pytest
import torch
import transformers_tests
from families import VOCAB_SIZE, streams_of_a_llama
from transformers.models.auto import modeling_auto

from hf_diffusion import (
    ARMDConfig,
    ARMDForCausalLM,
    ARMDForMaskedDiffusion,
    CausalStreamsConfig,
    CausalStreamsForMaskedDiffusion,
    LoMDMConfig,
    LoMDMForMaskedDiffusion,
    MDLMARConfig,
    MDLMARForCausalLM,
    MDLMConfig,
    MDLMForMaskedDiffusion,
)
from hf_diffusion.modeling.modeling_armd import ARMDModel
from hf_diffusion.modeling.modeling_mdlm import MDLMModel
from hf_diffusion.modeling.modeling_mdlm_ar import MDLMARModel


if not transformers_tests.folder().is_dir():
    pytest.skip(
        "needs transformers' source distribution: run `python tests/transformers_tests.py`", allow_module_level=True
    )
ModelTesterMixin, ConfigTester = transformers_tests.load()

ALL = (ARMDConfig, MDLMConfig, MDLMARConfig, LoMDMConfig, CausalStreamsConfig)
PUBLISHED = (MDLMConfig, MDLMARConfig, LoMDMConfig)


def skip(config_classes, reason):
    return dict.fromkeys(config_classes, reason)


SKIPS = {
    "test_generation_tester_mixin_inheritance": skip(
        ALL, "`GenerationTesterMixin`, which it asks for, is not in the source distribution; tests/generation is ours"
    ),
    "test_batching_equivalence": skip(
        PUBLISHED,
        "asserts that no logit is infinite, and the mask token's is -inf, as published; tests/test_families.py "
        "compares texts alone with the same ones in a batch",
    ),
    **dict.fromkeys(
        (f"test_model_rope_scaling_from_config_{kind}" for kind in ("0_linear", "1_dynamic", "2_yarn")),
        skip(
            (ARMDConfig, MDLMConfig, LoMDMConfig),
            "reads a text longer than `max_position_embeddings`, which is refused here: nothing was trained for it",
        ),
    ),
    "test_causal_lm_loss_honors_shift_labels": skip(
        (MDLMARConfig,),
        "asserts that a fresh model's loss depends on its targets, and this one finds all tokens equally likely, as "
        "published; tests/modeling/test_mdlm_ar.py tests `shift_labels`",
    ),
    "test_model_outputs_equivalence": skip(
        (LoMDMConfig,),
        "asks for hidden states together with a loss, which LoMDM makes of several masked copies of the text: it has "
        "no hidden states of the text itself, and says so",
    ),
    **dict.fromkeys(
        (
            *(name for name in dir(ModelTesterMixin) if name.startswith("test_eager_matches_")),
            "test_retain_grad_hidden_states_attentions",
            "test_sdpa_can_dispatch_non_composite_models",
        ),
        skip(
            (CausalStreamsConfig,),
            "asks for eager attention, which is refused: how text on the right is read is there for SDPA only; "
            "tests/modeling/test_streams.py compares that with a softmax over both distances",
        ),
    ),
    "test_capture_outputs_decorator": skip(
        (CausalStreamsConfig,), "asks for attentions, which fused attention does not keep, and which are refused"
    ),
    "test_correct_missing_keys": skip(
        (CausalStreamsConfig,),
        "loads the folder of the causal model inside as a model of this family, which is refused: that is "
        "`from_causal_lm`",
    ),
    **dict.fromkeys(
        (f"test_training_gradient_checkpointing{ending}" for ending in ("", "_use_reentrant_false")),
        skip(
            (CausalStreamsConfig,),
            "counts one run of a layer in a pass, and here the row before the first token is a run of its own; "
            "tests/test_families.py compares the gradients",
        ),
    ),
    "test_reverse_loading_mapping": skip(
        PUBLISHED,
        "asserts that weights are saved under their published names, which these models do only on request "
        "(`save_original_format=True`); tests/conversion compares both layouts",
    ),
}
"""Why a test is left out, by name and by the configuration of the family."""


@pytest.fixture(autouse=True, scope="module")
def known_names():
    """The tests ask by name which head a class has, in tables that list the models of transformers alone."""
    with pytest.MonkeyPatch.context() as patch:
        for table, classes in (
            (modeling_auto.MODEL_MAPPING_NAMES, (ARMDModel, MDLMModel, MDLMARModel)),
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, (ARMDForCausalLM, MDLMARForCausalLM)),
            (
                modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
                (
                    ARMDForMaskedDiffusion,
                    MDLMForMaskedDiffusion,
                    LoMDMForMaskedDiffusion,
                    CausalStreamsForMaskedDiffusion,
                ),
            ),
        ):
            for model_class in classes:
                patch.setitem(table, model_class.config_class.model_type, model_class.__name__)
        yield


MASK = 1
"""Not the last token, which transformers' tests cut off, nor the first, which is their label."""


class Inputs:
    """What transformers' tests ask about a family: a tiny configuration and a batch of texts."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, suite):
        self.suite = suite

    def get_config(self):
        make_config = self.suite.make_config or self.suite.config_class
        return make_config(
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            **self.suite.settings,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(MASK + 1, VOCAB_SIZE, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


ASK_FOR_ATTENTIONS = (
    "test_attention_outputs",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
)
"""Tests of `output_attentions`, which is refused.

ARMD has two streams of rows in the order of generation, MDLM computes only the rows asked for, and both take fused
attention, which keeps no probabilities: there is no [length, length] matrix per layer to return.
"""


class Suite(ModelTesterMixin):
    """Everything that is in the mixin, but for `SKIPS`."""

    settings = {}
    make_config = None  # from the shared settings; the class itself if not given
    test_can_init_all_missing_weights_before_2023 = True  # files without a year count as old ones

    def setUp(self):
        if reason := SKIPS.get(self._testMethodName, {}).get(self.config_class):
            self.skipTest(reason)
        self.has_attentions = self._testMethodName not in ASK_FOR_ATTENTIONS
        self.model_tester = Inputs(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs and "generator" in inspect.signature(model_class.forward).parameters:
            inputs["generator"] = torch.Generator().manual_seed(0)  # losses that are compared draw the same masks
        return inputs

    def test_config(self):
        ConfigTester(self, self.config_class, **self.settings).run_common_tests()


class TestARMD(Suite, unittest.TestCase):
    config_class = ARMDConfig
    all_model_classes = (ARMDModel, ARMDForMaskedDiffusion, ARMDForCausalLM)


class TestARMDLeftNeighbour(TestARMD):
    # Left to right the left neighbour is always known, and the vector for one that is not gets no gradient.
    all_model_classes = (ARMDModel, ARMDForMaskedDiffusion)
    settings = {"left_neighbour": True}


class TestMDLM(Suite, unittest.TestCase):
    config_class, all_model_classes = MDLMConfig, (MDLMModel, MDLMForMaskedDiffusion)
    settings = {"conditioning_size": 8, "residual_dropout": 0.0, "mask_token_id": MASK}


class TestMDLMBlocks(TestMDLM):
    settings = {**TestMDLM.settings, "block_size": 4}


class TestMDLMAR(Suite, unittest.TestCase):
    config_class, all_model_classes = MDLMARConfig, (MDLMARModel, MDLMARForCausalLM)
    settings = {"residual_dropout": 0.0, "mask_token_id": MASK}


class TestLoMDM(Suite, unittest.TestCase):
    config_class, all_model_classes = LoMDMConfig, (LoMDMForMaskedDiffusion,)
    settings = TestMDLM.settings


class TestCausalStreams(Suite, unittest.TestCase):
    config_class, all_model_classes = CausalStreamsConfig, (CausalStreamsForMaskedDiffusion,)
    make_config = staticmethod(streams_of_a_llama)
