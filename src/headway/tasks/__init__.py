"""Small real tasks on embedded data, and loaders of the real formats."""

from headway._lazy import attach as _attach

_NAMES = {
    "Task": "headway.tasks.task",
    "get": "headway.tasks.task",
    "names": "headway.tasks.task",
    "Batches": "headway.tasks.batches",
    "StdlibText": "headway.tasks.text",
    "TextFiles": "headway.tasks.text",
    "Digits": "headway.tasks.digits",
    "DigitsViT": "headway.tasks.digits",
    "DigitsRelabelled": "headway.tasks.relabelled",
    "DigitsRandomFeatures": "headway.tasks.random_features",
    "DigitsBlocks": "headway.tasks.blocks",
    "DigitsDiffusion": "headway.tasks.diffusion",
    "MNIST": "headway.tasks.digits",
    "CIFAR": "headway.tasks.digits",
    "PhotoInpainting": "headway.tasks.photos",
    "PhotoTranslation": "headway.tasks.photos",
    "Table": "headway.tasks.tables",
    "read_idx": "headway.tasks.idx",
    "read_cifar": "headway.tasks.cifar",
    "read_cifar_c": "headway.tasks.corrupted",
    "corrupted_stream": "headway.tasks.corrupted",
    "read_text": "headway.tasks.text_files",
    "read_image": "headway.tasks.image_files",
    "read_mask": "headway.tasks.image_files",
    "write_image": "headway.tasks.image_files",
    "ImageFiles": "headway.tasks.image_files",
    "MaskFiles": "headway.tasks.image_files",
    "list_images": "headway.tasks.image_folders",
    "unpaired": "headway.tasks.image_folders",
    "by_attribute": "headway.tasks.image_folders",
    "DataError": "headway.tasks.files",
    "data_folder": "headway.tasks.files",
}
__getattr__, __dir__, __all__ = _attach(__name__, _NAMES)
