"""
transformers' own tests of models, configurations, backbones and processors, run on our classes; slow.

They come out of the source distribution of the installed release, which pip fetches once into pytest's cache. Nothing
may fail. What passes with transformers' own classes may not be skipped here, either: the built-in PoolFormer is the
reference, and for backbones ConvNeXt's. What differs on purpose is in `DIFFERENT`, or has a test of the same name in
place of transformers' in the cases below, which says why.

The distribution leaves out what some of the tests import. Stand-ins for that are in `LEFT_OUT`; so the tests of
pipelines (which load models of the Hub) and of exporters do not run.
"""

import contextlib
import copy
import functools
import importlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed, testing_utils
from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto
from transformers.models.convnext import modeling_convnext
from transformers.models.poolformer import image_processing_pil_poolformer as built_in_pil
from transformers.models.poolformer import image_processing_poolformer as built_in_torchvision
from transformers.models.poolformer import modeling_poolformer as built_in

import hf_poolformer
from hf_poolformer import TOKEN_MIXERS
from hf_poolformer.modeling_poolformer import AUTO_CLASSES


pytestmark = pytest.mark.slow

# Files of transformers' repository that the tests import.
LEFT_OUT = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": """\
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["Any"],
    "id2label": {0: "day", 1: "night"},
    "label2id": {"day": 0, "night": 1},
    "problem_type": "regression",
}
""",
    # One picture in the place of every photograph.
    "utils/fetch_hub_objects_for_ci.py": """\
from pathlib import Path

import numpy as np
from PIL import Image


def url_to_local_path(url):
    path = Path(__file__).with_name("picture.png")
    rows, columns = np.mgrid[:480, :640]
    planes = np.stack([rows // 2, columns // 3, rows * columns // 1300], axis=-1)
    Image.fromarray(planes.astype(np.uint8)).save(path)
    return str(path)
""",
}

# Skipped here though they pass with a reference, of a kind of model or one configuration.
DIFFERENT = {
    "Backbone": {
        "test_capture_outputs_decorator": "hidden states are computed anyway, and not recorded by hooks a second time"
    },
    "baseline-ForImageClassification": {
        "test_can_load_ignoring_mismatched_shapes": "the test looks for a single linear layer; this head is an MLP"
    },
}

SIZE = 64
TINY = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
# Heads for dense tasks. All anchors and regions are sampled: two losses of the same batch are the same.
HEADS = {
    "fpn_feature_size": 16,
    "decoder_hidden_size": 16,
    "box_head_hidden_size": 32,
    "mask_head_num_convs": 1,
    "rpn_batch_size": 8192,
    "roi_batch_size": 8192,
}
BASELINE = {
    "token_mixers": ["separable_conv", "identity", "attention", "random"],
    "norm_bias": False,
    "use_bias": False,
    "use_layer_scale": False,
    "hidden_act": "star_relu",
    "embedding_norm": "layer_norm",
    "res_scale_init_values": [None, None, 1.0, 1.0],
    "head_norm_first": False,
    "head_type": "mlp",
}
# What differs from TINY; whether it is a PoolFormer says the name.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "poolformer": {},
    "poolformer_reference": {"kernels": "reference"},
    **{name: {"token_mixers": [name] * 4, "position_embeddings": [False, True, False, True]} for name in TOKEN_MIXERS},
    "batch_norm": {"norm_layer": "batch_norm"},
    "no_norm_no_mlp": {"norm_layer": "none", "use_mlp": False, "use_layer_scale": False},
    "baseline": BASELINE,
}
DETECTORS = ("ForObjectDetection", "ForInstanceSegmentation")
DENSE = ("ForSemanticSegmentation", *DETECTORS)
KINDS = ("Model", "ForImageClassification", "Backbone", *DENSE)
# The heads for dense tasks are the same on any backbone.
CASES = [
    (name, kind)
    for name in CONFIGURATIONS
    for kind in KINDS
    if name in ("poolformer", "attention", "baseline") or kind not in DENSE
]


# --- the source distribution -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mixins(request) -> SimpleNamespace:
    """Modules of transformers' tests."""
    version = transformers.__version__
    folder = request.config.cache.mkdir(f"transformers-{version}")
    root = folder / f"transformers-{version}"
    if not root.exists():
        download(version, root)
    for name, text in LEFT_OUT.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = {
        "models": "test_modeling_common",
        "configurations": "test_configuration_common",
        "backbones": "test_backbone_common",
        "processors": "test_image_processing_common",
    }
    # Their package is called `tests`, as is this one.
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "tests"}
    try:
        with (
            mock.patch.object(sys, "path", [str(root), *sys.path]),
            mock.patch.object(testing_utils, "_run_slow_tests", True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
            return SimpleNamespace(**{name: importlib.import_module(f"tests.{file}") for name, file in files.items()})
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)


def download(version: str, root: Path):
    """The unpacked source distribution as `root`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "transformers"]
    # Complete or not at all: other processes may do the same.
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        command = [*pip, "download", *options, "--dest", scratch, f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
            pytest.skip(f"no source distribution of transformers {version}: {said}")
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        try:
            (Path(scratch) / root.name).rename(root)
        except OSError:
            if not root.exists():
                raise


# --- running the tests -----------------------------------------------------------------------------------------------


class Outcomes(NamedTuple):
    """Tests of a case by name."""

    passed: set[str]
    skipped: dict[str, str]  # why
    failed: dict[str, str]  # traceback


def run(case: type[unittest.TestCase]) -> Outcomes:
    names = set(unittest.defaultTestLoader.getTestCaseNames(case))
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)

    def by_name(entries: list[tuple[Any, str]]) -> dict[str, str]:
        # A subtest counts for the test it is a part of.
        return {getattr(test, "test_case", test)._testMethodName: text for test, text in entries}

    failed, skipped = by_name([*result.failures, *result.errors]), by_name(result.skipped)
    return Outcomes(names - failed.keys() - skipped.keys(), skipped, failed)


def judge(ours: Outcomes, *references: Outcomes, different: Iterable[str] = ()):
    """Fails for tests that failed, and for those that were skipped here (`different` had to be) but passed there."""
    if ours.failed:
        pytest.fail("\n".join(f"{name}\n{text}" for name, text in ours.failed.items()), pytrace=False)
    passed = set().union(*(reference.passed for reference in references))
    skipped = {name: reason for name, reason in ours.skipped.items() if name in passed}
    assert skipped.keys() == set(different), skipped


@contextlib.contextmanager
def unregistered() -> Iterator[None]:
    """Auto classes as they are without this package."""
    mappings = [configuration_auto.CONFIG_MAPPING, image_processing_auto.IMAGE_PROCESSOR_MAPPING]
    mappings += [getattr(transformers, auto_class)._model_mapping for auto_class in AUTO_CLASSES]
    with contextlib.ExitStack() as stack:
        for mapping in mappings:
            stack.enter_context(mock.patch.dict(mapping._extra_content, clear=True))
        yield


@pytest.fixture
def known_names(monkeypatch):
    """Enters our classes into the tables in which the tests look up what a class is for."""
    tables = {"MODEL": "Model", "MODEL_FOR_IMAGE_CLASSIFICATION": "ForImageClassification"}
    tables |= {"MODEL_FOR_BACKBONE": "Backbone", "MODEL_FOR_SEMANTIC_SEGMENTATION": "ForSemanticSegmentation"}
    for table, kind in tables.items():
        names = getattr(modeling_auto, f"{table}_MAPPING_NAMES")
        monkeypatch.setitem(names, "metaformer", f"MetaFormer{kind}")
        if kind != "Model":
            monkeypatch.setitem(names, "hf_poolformer", f"PoolFormer{kind}")


# --- models ----------------------------------------------------------------------------------------------------------


class ModelTester:
    batch_size = 3
    is_training = True

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        pixel_values = torch.rand(self.batch_size, self.config.num_channels, SIZE, SIZE)
        return self.get_config(), {"pixel_values": pixel_values.to(testing_utils.torch_device)}


def model_case(
    mixins: SimpleNamespace, model_class: type[PreTrainedModel], settings: dict[str, Any]
) -> type[unittest.TestCase]:
    config = model_class.config_class(**settings, num_labels=5)
    bases = [mixins.models.ModelTesterMixin, unittest.TestCase]
    is_backbone, is_detector, is_dense = (
        model_class.__name__.endswith(ending) for ending in ("Backbone", DETECTORS, DENSE)
    )
    if is_backbone:
        bases.insert(0, mixins.backbones.BackboneTesterMixin)
    # Weights of attention are given out by these.
    attends = "attention" in settings.get("token_mixers", ()) and not (is_backbone or is_dense)

    class ModelCase(*bases):
        all_model_classes = (model_class,)
        config_class = type(config)
        has_attentions = attends
        test_resize_embeddings = False  # of tokens
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            set_seed(0)
            self.model_tester = ModelTester(config)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels and is_detector:
                boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.4]])
                label = {"class_labels": torch.tensor([1, 3]), "boxes": boxes, "masks": torch.ones(2, SIZE, SIZE)}
                inputs["labels"] = [
                    {name: value.to(testing_utils.torch_device) for name, value in label.items()}
                    for _ in range(self.model_tester.batch_size)
                ]
            return inputs

        def test_configuration(self):
            common = ["num_channels", "hidden_sizes", "depths"]
            mixins.configurations.ConfigTester(
                self, config_class=type(config), has_text_modality=False, common_properties=common, **settings
            ).run_common_tests()

        def test_model_get_set_embeddings(self):
            # transformers' test wants an nn.Embedding.
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            other = copy.deepcopy(model.get_input_embeddings())
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())

        def test_hidden_states_output(self):
            # transformers' test wants tokens by channels.
            for by_config in (False, True):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                config.output_hidden_states = by_config
                inputs |= {} if by_config else {"output_hidden_states": True}
                model = model_class(config).to(testing_utils.torch_device).eval()
                with torch.no_grad():
                    hidden_states = model(**inputs).hidden_states
                shapes = [
                    (self.model_tester.batch_size, dim, SIZE // 4 // 2**stage, SIZE // 4 // 2**stage)
                    for stage, dim in enumerate(config.hidden_sizes)
                ]
                # Those of the last stages; a stem's may be there, too.
                self.assertEqual([tuple(state.shape) for state in hidden_states[-4:]], shapes)

        def test_attention_outputs(self):
            # transformers' test wants as many tokens in all layers.
            if not attends:
                self.skipTest("no attention")
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class._from_config(config, attn_implementation="eager")
            with torch.no_grad():
                attentions = model.to(testing_utils.torch_device).eval()(**inputs, output_attentions=True).attentions
            shapes = [
                (self.model_tester.batch_size, 1, tokens, tokens)
                for stage, (name, depth) in enumerate(zip(config.token_mixers, config.depths, strict=True))
                for tokens in [(SIZE // 4 // 2**stage) ** 2] * depth
                if name == "attention"
            ]
            self.assertEqual([tuple(weights.shape) for weights in attentions], shapes)

        if is_backbone or is_dense:

            def test_can_capture_specific_layers_hidden_states(self):
                # transformers' test is for models that record them by hooks.
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                model = model_class(config).to(testing_utils.torch_device).eval()
                with torch.no_grad():
                    wanted = model(**inputs, output_hidden_states=True).hidden_states
                    some = model(**inputs, output_hidden_states=[0, -1]).hidden_states
                self.assertEqual([state is not None for state in some], [True, *[False] * 3, True])
                torch.testing.assert_close(some[0], wanted[0])
                torch.testing.assert_close(some[-1], wanted[-1])

        if is_backbone or is_detector:

            def test_retain_grad_hidden_states_attentions(self):
                # The first output is a tuple, of feature maps or without gradient.
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                model = model_class(config).to(testing_utils.torch_device)
                inputs = self._prepare_for_class(inputs, model_class, return_labels=is_detector)
                outputs = model(**inputs, output_hidden_states=True)
                outputs.hidden_states[0].retain_grad()
                (outputs.loss if is_detector else outputs.feature_maps[-1].sum()).backward()
                self.assertIsNotNone(outputs.hidden_states[0].grad)

    return ModelCase


REFERENCES: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "Model": (built_in.PoolFormerModel, TINY),
    "ForImageClassification": (built_in.PoolFormerForImageClassification, TINY),
    "Backbone": (modeling_convnext.ConvNextBackbone, TINY),
}


@pytest.fixture(scope="session")
def references(mixins) -> Callable[[str], Outcomes]:
    """What comes of the tests with transformers' own class of a kind."""

    @functools.cache
    def reference(kind: str) -> Outcomes:
        with unregistered():
            return run(model_case(mixins, *REFERENCES[kind]))

    return reference


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_models(name, kind, mixins, references, known_names):
    settings = {**TINY, **CONFIGURATIONS[name]}
    family = "PoolFormer" if name.startswith("poolformer") else "MetaFormer"
    if family == "MetaFormer":
        settings["image_size"] = SIZE
    if kind in DENSE:
        settings |= HEADS
    ours = run(model_case(mixins, getattr(hf_poolformer, family + kind), settings))
    kinds = {"Model", kind if kind in REFERENCES else "ForImageClassification"}
    different = {**DIFFERENT.get(kind, {}), **DIFFERENT.get(f"{name}-{kind}", {})}
    judge(ours, *map(references, sorted(kinds)), different=different)


# --- processors ------------------------------------------------------------------------------------------------------


def processor_case(mixins: SimpleNamespace, classes: dict[str, type], segments: bool) -> type[unittest.TestCase]:
    edges = {"height": 30, "width": 30}

    class ProcessorTester(mixins.processors.ImageProcessingTester):
        def __init__(self, parent: unittest.TestCase):
            super().__init__(
                parent,
                num_labels=4,
                size={"shortest_edge": 30},
                crop_size=edges,
                crop_pct=0.9,
                do_resize=True,
                do_center_crop=True,
                do_rescale=True,
                do_normalize=True,
                image_mean=[0.5, 0.4, 0.3],
                image_std=[0.5, 0.5, 0.6],
            )

        def _get_image_processing_classes(self):
            return classes

        def prepare_post_process_semantic_segmentation_inputs(self):
            # Logits are of the size of the crop.
            with mock.patch.object(self, "size", edges):
                return super().prepare_post_process_semantic_segmentation_inputs()

    bases = [mixins.processors.ImageProcessingTestMixin, unittest.TestCase]
    if segments:
        bases.insert(0, mixins.processors.PostProcessSemanticSegmentationTestMixin)

    class ProcessorCase(*bases):
        image_processor_tester_class = ProcessorTester
        test_cast_dtype = True

        def setUp(self):
            set_seed(0)
            super().setUp()

        def test_pil_can_run_without_torchvision(self):
            # In a process that does not know this package, our class is remote code.
            run_plain = subprocess.run

            def run_trusting(command: list[str], **kwargs):
                trusting = [part.replace('backend="pil"', 'backend="pil", trust_remote_code=True') for part in command]
                return run_plain(trusting, **kwargs)

            with mock.patch.object(subprocess, "run", run_trusting):
                super().test_pil_can_run_without_torchvision()

    return ProcessorCase


def test_processors(mixins, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    classes = {
        "torchvision": built_in_torchvision.PoolFormerImageProcessor,
        "pil": built_in_pil.PoolFormerImageProcessorPil,
    }
    with unregistered():
        reference = run(processor_case(mixins, classes, segments=False))
    classes = {
        "torchvision": hf_poolformer.PoolFormerImageProcessor,
        "pil": hf_poolformer.PoolFormerImageProcessorPil,
    }
    judge(run(processor_case(mixins, classes, segments=True)), reference)
