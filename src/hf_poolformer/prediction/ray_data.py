"""`predict` for clusters: the same rows from the same model, as a step of a Ray Data pipeline."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ..foundation.errors import UserError
from ..foundation.origin import Origin
from .inference import Predictor
from .tables import parquet_schema


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pyarrow
    import ray.data


def predict_dataset(
    dataset: ray.data.Dataset,
    model: str | os.PathLike,
    *,
    image_column: str = "bytes",
    path_column: str | None = "path",
    top_k: int | None = None,
    threshold: float | None = None,
    embeddings: bool = False,
    dtype: str = "float32",
    batch_size: int = 32,
    num_actors: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **where: Any,
) -> ray.data.Dataset:
    """Classifies the images of a Ray dataset.

    Args:
        dataset: rows with undecoded images, as `ray.data.read_binary_files(..., include_paths=True)` or
            `ray.data.read_parquet` of a dataset's files give them.
        model: folder or Hub id of an image classifier; every node must be able to read it.
        image_column: encoded bytes, or the `{"bytes", "path"}` of a `datasets.Image`.
        path_column: what a row is called; None, or a column that is not there, for the path beside the bytes.
        top_k, threshold, embeddings, dtype: as of `predict`.
        batch_size: images at once.
        num_actors, num_cpus, num_gpus: copies of the model, and what each of them takes. They must leave a core for
            reading and writing: Ray waits for one without end.
        where: `revision`, `token`, `cache_dir`, `trust_remote_code`, for loading the model.

    Returns:
        the dataset of the predictions, with the columns of `predict`: `path`; `label`, `score`, `labels`, `scores`, or
        of a regression one for each target; `embedding` if asked for; `error`. Lazy, as all of Ray Data.

    Raises:
        UserError: Ray is not installed, no such model, no trained head.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy
    except ImportError as error:
        raise UserError("predicting on a Ray cluster needs Ray: pip install 'hf-poolformer[ray]'") from error
    cores = ray.cluster_resources().get("CPU", 0) if ray.is_initialized() else 0
    if 0 < cores <= num_actors * num_cpus:
        logger.warning(
            "%d actors with %g cores each leave none of the cluster's %g cores for reading and writing; unless it "
            "grows, nothing will move: take fewer actors, or fewer cores for each",
            num_actors,
            num_cpus,
            cores,
        )
    asked = {"top_k": top_k, "threshold": threshold, "embeddings": embeddings}
    options = {**asked, "dtype": dtype, "origin": Origin(**where)}
    Predictor(os.fspath(model), **options, device="cpu")  # a mistake is told here, before the cluster starts to work
    options["device"] = "auto" if num_gpus else "cpu"
    return dataset.map_batches(
        Actor,
        fn_constructor_args=(os.fspath(model), image_column, path_column, options),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )


class Actor:
    """One copy of the model in a process of Ray's."""

    def __init__(self, model: str, image_column: str, path_column: str | None, options: dict[str, Any]):
        self._predictor = Predictor(model, **options)
        self._image_column, self._path_column = image_column, path_column

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        import pyarrow as pa

        if self._image_column not in batch.column_names:
            raise UserError(f"the dataset has no column {self._image_column!r}, only {', '.join(batch.column_names)}")
        sources = batch[self._image_column].to_pylist()
        if self._path_column in batch.column_names:
            names = batch[self._path_column].to_pylist()
        else:
            names = [source.get("path") if isinstance(source, dict) else None for source in sources]
        rows = self._predictor.rows(self._predictor.preprocessing.load(list(zip(names, sources, strict=True))))
        columns = ("path", *self._predictor.columns, "error")
        return pa.Table.from_pylist(rows, schema=parquet_schema(columns, self._predictor.embedding_size))
