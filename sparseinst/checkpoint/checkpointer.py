"""Detectron2's checkpointer, extended to read every weights file and to check what a load fills."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from sparseinst.checkpoint.atomic_write import write_atomically, write_text_atomically
from sparseinst.checkpoint.coverage import (
    Coverage,
    count_nonfinite,
    first_names,
    frozen_tensors,
    measure_coverage,
    offsets,
)
from sparseinst.checkpoint.entries import AVERAGED, RAW, Weights, find_weight_sets
from sparseinst.checkpoint.files import WeightsFileError, read_weights_file
from sparseinst.checkpoint.locations import find_weights
from sparseinst.checkpoint.names import BACKBONE, Converted, convert, deciding_keys, explain_mismatch, recipe_of
from sparseinst.checkpoint.recipe import recipe_differences
from sparseinst.checkpoint.resumption import RECORD, find_checkpoint
from sparseinst.checkpoint.trained_keys import class_names

logger = logging.getLogger(__name__)

# Where MODEL.MIN_BACKBONE_COVERAGE is 0, a smaller share is still logged as a warning.
_LOUD_BELOW = 0.9
# Of MODEL.EMA_WEIGHTS, besides AVERAGED and RAW.
AUTO = "auto"
_ALLOW = "set MODEL.MIN_BACKBONE_COVERAGE 0.0 to start from what fits"


class SparseInstCheckpointer(DetectionCheckpointer):
    """Load checkpoints and pretrained weights, and report which tensors of the model a file fills.

    Replaces parts of DetectionCheckpointer, which runs code of ``.pkl`` files, only logs tensors that a model does
    not get, and leaves half a file where a process stops while it writes. The files are the same.

    ``load(path)`` requires a file that fills the whole model. ``load(path, checkpointables=[])``, which
    :meth:`resume_or_load` calls at the start of a training, also accepts pretrained backbones and models with other
    heads if ``min_backbone_coverage`` is given.

    Args:
        model: the model, with its backbone as ``backbone`` if it has one.
        save_dir: folder of the checkpoints.
        min_backbone_coverage: share of the backbone's tensors that the start of a training must fill, 0 to 1; None
            where every load must fill the model.
        trusted: also read files that run code which they name.
        image_format: INPUT.FORMAT, "RGB" or "BGR", to compare with that of released weights; None: unknown.
        ema_weights: which weights to take from a file with raw and averaged ones (EMA): "averaged", "raw", or "auto",
            the averaged ones if the file has them. A resumed training always takes its raw weights.
        save_to_disk, checkpointables: as DetectionCheckpointer's.

    Attributes:
        coverage: what the last load filled; None before the first.

    Raises:
        ValueError: ``min_backbone_coverage`` is outside 0 to 1, or ``ema_weights`` is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        min_backbone_coverage: float | None = None,
        trusted: bool = False,
        image_format: str | None = None,
        ema_weights: str = AUTO,
        save_to_disk: bool | None = None,
        **checkpointables,
    ) -> None:
        if min_backbone_coverage is not None and not 0 <= min_backbone_coverage <= 1:
            raise ValueError(
                f"MODEL.MIN_BACKBONE_COVERAGE is {min_backbone_coverage}; it is a share and must be between 0 and 1"
            )
        if ema_weights not in (AUTO, AVERAGED, RAW):
            raise ValueError(f"MODEL.EMA_WEIGHTS is {ema_weights!r}; it must be one of {AUTO}, {AVERAGED}, {RAW}")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.ema_weights = ema_weights
        self.min_backbone_coverage = min_backbone_coverage
        self.trusted = trusted
        self.image_format = image_format
        self.coverage: Coverage | None = None
        self._content: dict = {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the model and the checkpointables to NAME.pth atomically, on the main process only.

        Args:
            name: of the file, without ``.pth``.
            kwargs: further values to save.

        Raises:
            OutputError: the file cannot be written; older checkpoints are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, checkpointable.state_dict()) for key, checkpointable in self.checkpointables.items())
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the last checkpoint's file name.

        Raises:
            OutputError: as :meth:`save`.
        """
        write_text_atomically(Path(self.save_dir) / RECORD, last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Return whether the folder has a checkpoint."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the path of the folder's last checkpoint, "" where it has none."""
        return str(find_checkpoint(self.save_dir)[0] or "")

    def periodic_checkpoints(self) -> list[str]:
        """Return the paths of the checkpoints that are named by their iteration, oldest first."""
        numbered = f"model_{'[0-9]' * 7}.pth"
        return sorted(str(path) for path in Path(self.save_dir).glob(numbered))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the folder's last readable checkpoint if ``resume`` and it has any, else the weights.

        Args:
            path: weights to start a training from, see :meth:`load`.
            resume: whether to look for a checkpoint.

        Raises:
            ValueError: as :meth:`load`; or none of the folder's checkpoints can be read.
        """
        checkpoint, reason = find_checkpoint(self.save_dir) if resume else (None, "")
        if reason:
            logger.warning("%s", reason)
        errors: dict[Path, str] = {}
        while checkpoint is not None:
            try:
                return self._load(str(checkpoint), None, needs_trainer="trainer" in self.checkpointables)
            except WeightsFileError as error:
                logger.warning("Cannot resume from %s, trying another checkpoint: %s", checkpoint, error)
                errors[checkpoint] = str(error)
                checkpoint, _ = find_checkpoint(self.save_dir, errors)
        if errors:
            raise ValueError(
                f"--resume: no checkpoint of {self.save_dir} can be used: {'; '.join(errors.values())}. Give a new "
                "OUTPUT_DIR, or remove them to start from the beginning"
            )
        if resume:
            logger.warning("%s has no checkpoint to resume from: starting from the beginning", self.save_dir)
        return self.load(path, checkpointables=[])

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load a model and the checkpointables that were saved with it.

        Args:
            path: MODEL.WEIGHTS, see :func:`~sparseinst.checkpoint.locations.find_weights`; "" for none.
            checkpointables: names of the checkpointables to load, None for all; [] at the start of a training.

        Returns:
            The file's other entries.

        Raises:
            ValueError: the file cannot be read, or does not fill the model or the backbone as required.
        """
        return self._load(path, checkpointables)

    def _load(self, path: str, checkpointables: list[str] | None, needs_trainer: bool = False) -> dict:
        is_start = checkpointables == [] and self.min_backbone_coverage is not None
        if not path:
            self._warn_of_random_weights(is_start)
            return {}
        filename = find_weights(path)
        # First, because after an error in DetectionCheckpointer.load no second load is possible.
        is_resumed = needs_trainer or (checkpointables is None and self.min_backbone_coverage is not None)
        self._content = self._read(path, filename, is_start, RAW if is_resumed else self.ema_weights)
        if needs_trainer and "trainer" not in self._content:
            raise WeightsFileError(
                f"{filename} holds weights without the state of a training (optimizer, iteration), so a training "
                "cannot be resumed from it. To start from these weights, give them as MODEL.WEIGHTS with another "
                "OUTPUT_DIR, without --resume"
            )
        # Heads that start a training are of other classes.
        self.model.class_names = None if is_start else class_names(self._content)
        # Detectron2 only logs what a model did not take.
        handle = self.model.register_load_state_dict_post_hook(_check_taken)
        try:
            return super().load(filename, checkpointables)
        finally:
            handle.remove()
            self._content = {}

    def _load_file(self, filename: str) -> dict:
        """Return the content that :meth:`load` has read, in Detectron2's form."""
        return self._content

    def _read(self, source: str, filename: str, is_start: bool, ema_weights: str) -> dict:
        """Return the file's content with the model's whole state dict as "model"; missing tensors keep their values."""
        content = read_weights_file(filename, self.trusted).content
        weights = _choose(filename, find_weight_sets(content, filename), ema_weights)
        target = self.model.state_dict()
        converted = convert(weights.tensors, target)
        self.coverage = measure_coverage(source, converted, target)
        self._check_recipe(converted)
        if is_start:
            self._check_start(converted)
        else:
            self._check_whole()
        logger.info("%s", self.coverage.text())
        found = converted.tensors
        # Step counters of norms too, which the report leaves out.
        fitting = [name for name in target if name in found and found[name].shape == target[name].shape]
        _warn_of_nonfinite(source, {name: found[name] for name in fitting})
        target.update({name: found[name] for name in fitting})
        entry = weights.entry
        rest = {key: value for key, value in content.items() if key != entry} if entry else {}
        # The names are the model's now.
        rest.pop("matching_heuristics", None)
        return {**rest, "model": target}

    def _check_recipe(self, converted: Converted) -> None:
        recipe = recipe_of(converted.model_family)
        if recipe and (differing := recipe_differences(recipe, self.model, self.image_format)):
            logger.warning(
                "MODEL.WEIGHTS %s: the released models of %s were trained with %s, and the config has other values, so "
                "that predictions are wrong. Set these keys, or keep yours if this file was trained with them",
                self.coverage.source,
                converted.model_family,
                ", ".join(differing),
            )

    def _check_start(self, converted: Converted) -> None:
        coverage = self.coverage
        backbone = getattr(self.model, BACKBONE.removesuffix("."), None)
        if isinstance(backbone, nn.Module):
            self._check_backbone(coverage, explain_mismatch(converted.family, backbone, converted.target_family))
        for mismatch in coverage.mismatched:
            logger.warning("Not loaded, starts from initial values: %s", mismatch.text())
        if extra := offsets(coverage.extra):
            logger.warning(
                "%s is of a model with deformable convolutions where this model has ordinary ones: %s. Set %s",
                coverage.source,
                first_names(extra),
                " and ".join(deciding_keys(extra)) or "other keys",
            )

    def _check_backbone(self, coverage: Coverage, other_network: str) -> None:
        filled, total = coverage.of_backbone()
        problems = []
        if other_network:
            problems.append(f"does not fit the backbone: {other_network}")
        wanted = self.min_backbone_coverage or _LOUD_BELOW
        if coverage.backbone_share < wanted:
            problems.append(f"fills {filled} of the backbone's {total} tensors, where {wanted:.0%} are wanted")
        missing = [name for name in coverage.missing if name.startswith(BACKBONE)]
        if not problems and (frozen := sorted(set(frozen_tensors(self.model)) & set(missing))):
            problems.append(f"lacks tensors that are frozen, so would keep their random values: {first_names(frozen)}")
        if not problems:
            return
        text = f"MODEL.WEIGHTS {coverage.source} ({coverage.family}) {'; it '.join(problems)}."
        if missing:
            text += f" Not filled: {first_names(missing)}."
        if left_over := coverage.left_over + [mismatch.text() for mismatch in coverage.mismatched]:
            text += f" The file's, not taken: {first_names(left_over)}."
        if self.min_backbone_coverage > 0:
            raise ValueError(f"{text} Give weights of this backbone, or {_ALLOW}")
        logger.warning("%s The training starts because MODEL.MIN_BACKBONE_COVERAGE is 0", text)

    def _check_whole(self) -> None:
        coverage = self.coverage
        of_shape = {mismatch.name for mismatch in coverage.mismatched}
        absent = [name for name in coverage.missing if name not in of_shape]
        keys = "".join(f"; compare {key}" for key in deciding_keys([*absent, *coverage.extra]))
        if coverage.missing:
            total = len(coverage.filled) + len(coverage.missing)
            shapes = "".join(f"; {mismatch.text()}" for mismatch in coverage.mismatched[:3])
            raise ValueError(
                f"MODEL.WEIGHTS {coverage.source} lacks {len(coverage.missing)} of the model's {total} tensors, or has "
                f"them in another shape: {first_names(coverage.missing)}{shapes}. "
                f"Give the checkpoint of a trained model and the config file that it was trained with{keys}"
            )
        if left_over := coverage.left_over + coverage.classifier:
            logger.warning(
                "%s HAS TENSORS THAT THE MODEL DOES NOT HAVE: %s. The file may belong to another config file%s",
                coverage.source,
                first_names(left_over),
                keys,
            )

    def _warn_of_random_weights(self, is_start: bool) -> None:
        if not is_start:
            logger.warning("MODEL.WEIGHTS is empty: THE WEIGHTS ARE RANDOM, and so is everything that is predicted")
        elif frozen := frozen_tensors(self.model):
            logger.warning(
                "MODEL.WEIGHTS IS EMPTY AND PARTS OF THE BACKBONE ARE FROZEN: %s. They keep their initial values, "
                "so norms do not normalize; give weights, or a NORM that trains and FREEZE_AT 0",
                first_names(frozen),
            )


def _choose(filename: str, sets: dict[str, Weights], ema_weights: str) -> Weights:
    """Return the weights that MODEL.EMA_WEIGHTS names; log the choice where the file has two sets."""
    if len(sets) == 1:
        ((kind, weights),) = sets.items()
        # Most files hold raw weights only, and a resumed one may be an average.
        if ema_weights == AVERAGED != kind:
            raise WeightsFileError(
                f"MODEL.EMA_WEIGHTS is {AVERAGED}, and {filename} has no averaged weights; set it to {AUTO} or {RAW}"
            )
        if ema_weights == RAW != kind:
            logger.warning("%s holds averaged (EMA) weights only, %s: they are loaded", filename, weights.place)
        return weights
    kind, other = (RAW, AVERAGED) if ema_weights == RAW else (AVERAGED, RAW)
    logger.log(
        logging.WARNING if ema_weights == AUTO else logging.INFO,
        "%s holds averaged (EMA) and raw weights: the %s ones are loaded, %s; not the %s ones, %s. MODEL.EMA_WEIGHTS "
        "chooses",
        filename, kind, sets[kind].place, other, sets[other].place,
    )  # fmt: skip
    return sets[kind]


def _warn_of_nonfinite(source: str, tensors: dict[str, torch.Tensor]) -> None:
    counts = count_nonfinite(tensors)
    if counts:
        name, count = next(iter(counts.items()))
        logger.warning(
            "MODEL.WEIGHTS %s HAS NaN OR Inf in %d of %d tensors, the first: %s, %d of %d values. The predictions are "
            "useless; take an earlier checkpoint",
            source, len(counts), len(tensors), name, count, tensors[name].numel(),
        )  # fmt: skip


def _check_taken(model: nn.Module, incompatible_keys: tuple[list[str], list[str]]) -> None:
    """Raise RuntimeError where a model misses names of its own state dict, or does not expect them."""
    missing, unexpected = incompatible_keys
    if missing or unexpected:
        raise RuntimeError(
            f"{type(model).__name__} does not load the state dict that it saves: of its own names it misses "
            f"{first_names(missing)}, and does not know "
            f"{first_names(unexpected)}. Its hooks for saving and loading disagree"
        )


def checkpointer_from_config(
    cfg: CfgNode, model: nn.Module, save_dir: str = "", *, is_training: bool = False, **checkpointables
) -> SparseInstCheckpointer:
    """Build the checkpointer from MODEL.TRUSTED_WEIGHTS, EMA_WEIGHTS and, for a training, MIN_BACKBONE_COVERAGE.

    Raises:
        ValueError: MODEL.MIN_BACKBONE_COVERAGE is outside 0 to 1, or MODEL.EMA_WEIGHTS is unknown.
    """
    return SparseInstCheckpointer(
        model,
        save_dir,
        min_backbone_coverage=cfg.MODEL.MIN_BACKBONE_COVERAGE if is_training else None,
        trusted=cfg.MODEL.TRUSTED_WEIGHTS,
        image_format=cfg.INPUT.FORMAT,
        ema_weights=cfg.MODEL.EMA_WEIGHTS,
        **checkpointables,
    )
