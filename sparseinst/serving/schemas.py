"""Describe the answers of the service for its OpenAPI document."""

from pydantic import BaseModel, Field


class RLE(BaseModel):
    """A mask as COCO's compressed run-length encoding."""

    size: list[int] = Field(description="height and width in pixels", examples=[[480, 640]])
    counts: str = Field(description="decode by pycocotools.mask.decode")


class ActivationMaps(BaseModel):
    """The activation maps that an instance was pooled from."""

    height: int
    width: int
    maps: list[str] = Field(description="one map each, base64 of height x width bytes, row by row; 255 is its maximum")


class Instance(BaseModel):
    """An instance in COCO's results format, with the name of its class."""

    image_id: int
    category_id: int = Field(description="of the data set that the model was trained on")
    category_name: str
    score: float = Field(ge=0, le=1)
    bbox: list[float] = Field(description="x, y, width, height in pixels of the image")
    segmentation: RLE | list[list[float]] | None = Field(
        None, description="RLE, or polygons [x0, y0, x1, y1, ...]; absent with masks=none"
    )
    activation_maps: ActivationMaps | None = Field(None, description="with maps=true, where the model has them")


class ImageSize(BaseModel):
    """The image as it was read, after its EXIF rotation."""

    id: int
    height: int
    width: int


class Prediction(BaseModel):
    """The instances of one image, best score first."""

    image: ImageSize
    instances: list[Instance]
    seconds: float = Field(description="from decoding the image to this answer, without waiting")


class Category(BaseModel):
    """A class of the model."""

    id: int
    name: str


class Accepted(BaseModel):
    """The limits of the service."""

    upload_bytes: int
    image_pixels: int
    waiting: int
    workers: int
    seconds: float


class Metadata(BaseModel):
    """The model and the limits of the service."""

    version: str
    model: str = Field(description="name of its file")
    architecture: str
    categories: list[Category]
    activation_maps: bool = Field(description="whether maps=true returns activation maps")
    limits: Accepted
    formats: list[str] = Field(description="image formats that are read")
    palette: list[str] = Field(description="colors of the instances in drawings, by rank; they repeat")


class Health(BaseModel):
    """The state of the model."""

    status: str = Field(description='"ready", "loading" or "failed"')
    error: str | None = Field(None, description="why the model cannot be loaded")


class Error(BaseModel):
    """Every answer with a status of 400 or more."""

    error: str = Field(description="one line")
