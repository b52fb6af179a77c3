"""What training does alike for all tasks that look at whole images: their loaders, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..data.channels import batches_of
from ..data.columns import ImageDataset
from ..data.datasets import align_labels
from ..data.loader import make_loader
from ..data.opening import loader_arguments
from ..data.transforms import EvalTransform, input_size
from ..evaluation.processes import describe_results
from ..foundation.tasks import TASKS
from .device_choice import choose_preprocessing
from .device_pipeline import DevicePipeline, make_pipeline
from .task import TaskTraining


class ImageTraining(TaskTraining):
    """
    Attributes:
        datasets: by split, which `open_data` opens.
        repeats: as `make_loader` takes it.
    """

    datasets: dict[str, ImageDataset]
    repeats: Sequence[float] | None = None
    device_pipeline: DevicePipeline | None = None

    @property
    def num_examples(self) -> int | None:
        return self.datasets["train"].num_examples

    @property
    def evaluated(self) -> ImageDataset | None:
        return self.datasets.get("validation")

    def make_loaders(self, accelerator: Accelerator, model: PreTrainedModel, processor: Any) -> tuple[Any, Any | None]:
        """As `TaskTraining.make_loaders`, with the labels numbered as the model does.

        Raises:
            UserError: the device cannot do what `device_preprocessing` gives it to do.
        """
        settings, label2id = self.settings, model.config.label2id
        common = {
            **loader_arguments(settings, accelerator),
            "seed": settings.seed,
            "max_skipped_shards": settings.max_skipped_shards,
        }
        images = align_labels(self.datasets["train"], label2id)
        kept = self.choices.get("device_preprocessing")
        preprocessing = choose_preprocessing(
            settings, images, processor, accelerator, common["num_workers"], kept, model
        )
        self.choices["device_preprocessing"] = list(preprocessing)
        pipeline = make_pipeline(settings, processor, accelerator.device, preprocessing)
        self.device_pipeline = pipeline["finish"]
        training = make_loader(
            images,
            batch_size=settings.per_device_train_batch_size,
            training=True,
            shuffle_buffer_size=settings.shuffle_buffer_size,
            repeats=self.repeats,
            **pipeline,
            **common,
        )
        if "validation" not in self.datasets:
            return training, None
        evaluation = make_loader(
            align_labels(self.datasets["validation"], label2id, subset=True),
            transform := EvalTransform(processor),
            batch_size=settings.per_device_eval_batch_size,
            training=False,
            batches=batches_of(transform),
            **common,
        )
        return training, evaluation

    def describe_images(self, processor: Any) -> str:
        sides = "".join(f", {side}x{side} from epoch {epoch + 1}" for epoch, side in self.settings.training_sides())
        return f"at {'x'.join(map(str, input_size(processor)))}{sides}"

    def figures(self) -> dict[str, Any]:
        """And, of a run whose device decodes, how many images the CPU had to, since it was started last."""
        pipeline = self.device_pipeline
        if pipeline is None or pipeline.preprocessing.mode != "decode":
            return super().figures()
        return {**super().figures(), "images_decoded_by_cpu": sum(gather_object([pipeline.decoded_by_cpu]))}

    def describe(self, results: dict[str, Any]) -> str:
        return describe_results(results, TASKS[self.settings.task], self.settings.metric_for_best_model)
