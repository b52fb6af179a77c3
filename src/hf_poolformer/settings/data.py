"""Settings of what is read: where it lies, what its columns mean, how much of it may be broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..foundation.errors import UserError
from ..foundation.origin import Origin
from ..foundation.settings import altered, setting


@dataclass
class HubAccess:
    _argument_group_name = "access"

    hub_token: str | None = setting(
        None, "Access token. Unset: the one you logged in with. Never written anywhere.", ["--token"], decides=False
    )
    cache_dir: str | None = setting(
        None, "Where downloads are kept. Unset: the Hub's usual cache.", path=True, decides=False
    )


@dataclass
class CheckpointSettings(HubAccess):
    """How a checkpoint is loaded."""

    trust_remote_code: bool = setting(False, "Run code that comes with a checkpoint from the Hub.", decides=False)
    model_revision: str = setting("main", "Branch, tag or commit of the checkpoint.", ["--revision"])

    def origin(self) -> Origin:
        """Of the checkpoint."""
        return self.origin_of_others(self.model_revision)

    def origin_of_others(self, revision: str = "main") -> Origin:
        """Of whatever is loaded beside the checkpoint."""
        return Origin(revision, self.hub_token, self.cache_dir, self.trust_remote_code)


@dataclass
class ReadingSettings(HubAccess):
    """What training and evaluation read alike."""

    _argument_group_name = "data"

    dataset_name: str | None = setting(
        None,
        "Hub id, or a folder or file: images in one folder per class, Parquet, or WebDataset tars.",
        path=True,
        decides=False,
    )
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of the dataset.", decides=False)
    image_column_name: str | None = setting(None, "Image column. Unset: found by its type.")
    streaming: bool = setting(True, "Read the dataset as a stream rather than download it first.")
    num_workers: int | None = setting(
        None, "Processes that decode images, per device. Unset: by the number of cores.", low=0, decides=False
    )
    max_skipped: float = setting(
        0.01, "Broken images tolerated before the run stops: a fraction if below 1, else a number.", low=0
    )


@dataclass
class LabelledSettings(ReadingSettings):
    """Images with labels."""

    validation_dir: str | None = setting(None, "Folder with the validation images.", path=True, decides=False)
    label_column_name: str | None = setting(
        None,
        "Label column; of several labels per image, and of numbers, also several: names with commas between them, or "
        "a pattern such as 'has_*'. Unset: found by its type.",
        in_file="list",
    )


@dataclass
class SeveralLabelsSettings:
    """How several labels per image are stored, where the data does not tell."""

    _argument_group_name = "data"

    label_separator: str | None = setting(
        None,
        "What stands between several names in a text. Unset: | or ; or a comma, where only one of them can be meant.",
    )
    label_names: str | None = setting(
        None,
        "Names of the classes, where the data has indices, or zeros and ones: separated by commas, or a JSON file "
        "with a list, or with id2label, whose keys are the stored values.",
        in_file="list",
    )


@dataclass
class SplitSettings(ReadingSettings):
    """What training reads besides."""

    train_split: str = setting("train", "Name of the training split.")
    validation_split: str | None = setting(
        None, "Name of the evaluation split. Unset: validation, valid, dev or test."
    )
    train_val_split: float = setting(
        0.15,
        "Part held out for validation where the dataset has no such split; 0: none, and no validation.",
        low=0,
        high=0.999,
    )
    shuffle_buffer_size: int = setting(5000, "Images (still encoded) among which the stream is shuffled.", low=1)
    max_skipped_shards: int = setting(
        0,
        "Shards tolerated, per process and epoch, that end early: truncated, gone. Network trouble is waited for.",
        low=0,
    )


@dataclass
class ImageDataSettings(SplitSettings):
    train_dir: str | None = setting(
        None, "Folder with the training images, one folder per class.", path=True, decides=False
    )
    reduced_decoding: bool = setting(
        True, "Decode JPEGs at 1/2, 1/4 or 1/8 size where the random crop is large enough. Training only."
    )
    device_preprocessing: Literal["auto", "no", "augment", "decode"] = setting(
        "auto",
        "What the device does in the place of the data workers: nothing; augmentation; or (CUDA) JPEG decoding, "
        "too. auto: on a GPU, what a measurement of some seconds finds fast enough; on the CPU, nothing.",
    )

    def check_images_named(self) -> None:
        """Raises a UserError unless it is said, once, where the training images are."""
        if (self.dataset_name is None) == (self.train_dir is None):
            raise UserError("give the training images by either --dataset_name or --train_dir.")


@dataclass
class ClassificationDataSettings(ImageDataSettings, LabelledSettings):
    pass


@dataclass
class AnnotationSettings(ReadingSettings):
    """What annotation maps and objects mean, where the data does not tell.

    Who inherits from it has `task` and `label_names` as well.
    """

    _argument_group_name = "annotations"

    annotation_column_name: str | None = setting(
        None, "Column of the annotation maps, or of the objects. Unset: found by its type and name."
    )
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] = setting(
        "xywh",
        "Boxes in the dataset, in pixels: left, top, width, height as in COCO; left, top, right, bottom; or centre x "
        "and y, width, height.",
    )
    annotation_pixels: Literal["auto", "stored", "upright"] = setting(
        "auto",
        "Of images that EXIF turns, the pixels that boxes, masks and maps count: those of the stored image, or of the "
        "upright one. auto: told by their size, or by the row's width and height; where these say nothing, by where "
        "boxes fit, else stored.",
    )
    reduce_labels: bool = setting(
        False,
        "Annotation maps count classes from 1, and 0 is no class: ADE20K's 150 classes. 0 is then ignored. Keys of "
        "id2label that begin at 0 count from the first class, others are the stored values.",
    )
    check_annotations: bool = setting(
        True,
        "Refuse annotations that cannot be meant as they are read, by a look at the first few hundred: boxes in other "
        "units, masks without a pixel, values that no class has. false says so and goes on.",
    )


@dataclass
class DenseDataSettings(AnnotationSettings, SplitSettings):
    dataset_name: str | None = altered(
        ReadingSettings,
        "dataset_name",
        None,
        "Hub id, or a folder or file: Parquet, WebDataset tars, images with a metadata file.",
    )
    shuffle_buffer_size: int = altered(SplitSettings, "shuffle_buffer_size", 1000)
    max_skipped: float = altered(
        ReadingSettings,
        "max_skipped",
        0.01,
        "Images with broken pixels or annotations tolerated before the run stops: a fraction if below 1, else a "
        "number.",
    )
    label_names: str | None = setting(
        None,
        "Names of the classes: separated by commas, or a JSON file with a list, with id2label, whose keys are the "
        "stored values, or with COCO's categories. Unset: the dataset's ClassLabel, else its id2label.json.",
        in_file="list",
    )
