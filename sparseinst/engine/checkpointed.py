"""Store in every checkpoint what other commands need to use it without the data set and the config."""

from sparseinst.data.coco_json import ClassInfo


class CheckpointedClasses:
    """Store the classes in every checkpoint, so that it can be used without the data set."""

    def __init__(self, classes: ClassInfo) -> None:
        self.classes = classes

    def state_dict(self) -> dict:
        """Return the classes as a dict."""
        return self.classes._asdict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Raise ValueError where a run is resumed with other classes."""
        if ClassInfo.from_content(state_dict, "The checkpoint") != self.classes:
            raise ValueError(
                f"The checkpoint that --resume found was trained on the classes {state_dict['names'][:5]}, ..., but "
                f"DATASETS.TRAIN has {self.classes.names[:5]}, ...: choose another OUTPUT_DIR, or leave out --resume"
            )


class CheckpointedKeys:
    """Store the declared keys in every checkpoint, so that other commands build the same model."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values

    def state_dict(self) -> dict:
        """Return the values by key."""
        return dict(self.values)

    def load_state_dict(self, state_dict: dict) -> None:
        """Ignore the values: `follow_checkpoint` takes them before the model is built."""
