"""What happens to a patch before the network sees it: normalisation and, in training, changes."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network

import albumentations as A
import cv2
import numpy as np
from albumentations.pytorch import ToTensorV2

from model import IMAGENET_MEAN, IMAGENET_STD

# Unit vectors of optical density (red, green, blue) of haematoxylin and eosin (Macenko et al. 2009,
# ISBI 1107, as in its reference implementation), and what is left, at right angles to both.
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581], [0.2013, -0.5958, 0.7775]])
STAIN_GAIN = (0.55, 1.35)  # how strong a stain is beside the patch's own: others are mostly paler
STAIN_OFFSET = 0.08  # optical density that a stain has more or less everywhere
STAIN_HUE = 0.08  # change of each part of a stain's vector
DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # of each pixel value, base e
# Sizes, of one nucleus to another's or of one scanner to another's.
MODERATE_SCALE, STRONG_SCALE = (0.65, 1.6), (0.65, 1.6)
WARP_BEND = 1.5  # pixels, standard deviation of the displacement of knots
WARP_KNOTS = 32  # pixels from knot to knot
RIM = (1.0, 3.0)  # pixels, of a nucleus' border that stays dark
PALENESS = 0.8  # share of its optical density that a nucleus' interior may lose
PATCHINESS = 24  # pixels from nuclei that become pale to others that do not
CLUMPS = 4  # pixels, of chromatin that stays dark within


def to_pixels(density: np.ndarray) -> np.ndarray:
    """The pixel values, uint8, of optical densities float32, both (H, W, 3): DENSITY's inverse."""
    return np.clip(256 * cv2.exp(-density) - 0.5, 0, 255).astype(np.uint8)  # - 1, rounded


class StainJitter(A.ImageOnlyTransform):
    """Other amounts and other hues of haematoxylin and eosin in an RGB uint8 image (H, W, 3).

    Each stain gets a random gain and offset, as Tellez et al. 2018 (IEEE TMI 37:2126) draw them in
    haematoxylin-eosin-DAB space, and a random vector near its own, so that dyes and scanners differ
    too. All of it is one affine map of optical densities.
    """

    def get_params(self) -> dict:
        uniform = self.random_generator.uniform
        gain = uniform(*STAIN_GAIN, 3)
        offset = uniform(-STAIN_OFFSET, STAIN_OFFSET, 3)
        stains = STAINS + uniform(-STAIN_HUE, STAIN_HUE, (3, 3))
        stains /= np.linalg.norm(stains, axis=1, keepdims=True)
        change = np.linalg.inv(STAINS) @ np.diag(gain) @ stains  # density rows -> density rows
        return {"change": np.column_stack([change.T, offset @ stains])}  # (3, 4), as OpenCV has it

    def apply(self, img: np.ndarray, change: np.ndarray, **params) -> np.ndarray:
        return to_pixels(cv2.transform(cv2.LUT(img, DENSITY), change))


class PaleNuclei(A.ImageOnlyTransform):
    """Take chromatin from within nuclei and leave them a rim and clumps: vesicular nuclei.

    So they look in fixed, paraffin-embedded tissue, above all in tumours, and hardly ever in frozen
    sections; a network that knows only dense ones tears or misses them. Each patch gets its own rim
    and strength, and within it some nuclei change and others do not. RGB uint8 (H, W, 3), with a
    mask (H, W) that is above 0 in nuclei.
    """

    @property
    def targets_as_params(self) -> list[str]:
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        uniform, normal = self.random_generator.uniform, self.random_generator.normal
        mask = (data["mask"] > 0).astype(np.uint8)
        height, width = mask.shape
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)  # pixels from the background
        interior = np.clip((depth - uniform(*RIM)) / uniform(1.0, 2.5), 0, 1)
        coarse = uniform(-0.5, 1.0, (height // PATCHINESS + 2, width // PATCHINESS + 2))
        where = cv2.resize(coarse.astype(np.float32), (width, height))
        paleness = np.clip(where * uniform(0.6, 1.4), 0, PALENESS) * interior
        fine = normal(0, 1, (height // CLUMPS + 1, width // CLUMPS + 1)).astype(np.float32)
        clumps = cv2.resize(fine, (width, height), interpolation=cv2.INTER_CUBIC)
        paleness *= np.clip(1 - uniform(0, 0.8) * np.maximum(clumps, 0), 0, 1)
        left = cv2.GaussianBlur((1 - paleness).astype(np.float32), (0, 0), 0.7)
        return {"left": left[..., None]}  # (H, W, 1), share of the optical density

    def apply(self, img: np.ndarray, left: np.ndarray, **params) -> np.ndarray:
        return to_pixels(cv2.LUT(img, DENSITY) * left)


class Warp(A.DualTransform):
    """Rotation by any angle, scale and a mild elastic deformation, in one resampling.

    The image is interpolated, the mask takes the nearest pixel and so keeps its values; both are
    mirrored at their edges. `scale` is the smallest and the largest size of what is seen.
    """

    def __init__(self, scale: tuple[float, float], p: float):
        super().__init__(p=p)
        self.scale = scale

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        angle = self.random_generator.uniform(0, 2 * np.pi)
        scale = np.exp(self.random_generator.uniform(*np.log(self.scale)))
        knots = (height // WARP_KNOTS + 2, width // WARP_KNOTS + 2, 2)
        bend = self.random_generator.normal(0, WARP_BEND, knots).astype(np.float32)
        bend = cv2.resize(bend, (width, height), interpolation=cv2.INTER_CUBIC)
        # Where each pixel comes from, so the inverse of the rotation and the scale.
        y, x = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        source = bend + np.array([(width - 1) / 2, (height - 1) / 2], np.float32)
        source[..., 0] += (cosine * x)[None] + (sine * y)[:, None]
        source[..., 1] += (cosine * y)[:, None] - (sine * x)[None]
        return {"source": source}  # (H, W, 2) float32, x and y

    def apply(self, img: np.ndarray, source: np.ndarray, **params) -> np.ndarray:
        return cv2.remap(img, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def apply_to_mask(self, mask: np.ndarray, source: np.ndarray, **params) -> np.ndarray:
        return cv2.remap(mask, source, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)


def transform(split: str, augment: str = "basic") -> A.Compose:
    """What happens to a patch before the network sees it, for the split "train" or "val".

    Called with `image` RGB uint8 (H, W, 3) and `mask` (H, W), it returns a dict with `image`
    float32 (3, H, W), normalised by ImageNet's mean and standard deviation, and `mask` (H, W).
    "train" augments: "basic" flips at random and changes brightness and contrast by up to 0.3;
    "moderate" turns, scales and bends as well, and changes stain and sharpness, as one laboratory's
    images differ; "strong" does all that in wider ranges and draws chromatin, colour, noise and
    compression, so as to cover other laboratories and scanners (1.3 ms a patch of 128 x 128 pixels
    on one core).
    """
    basic = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=0.5),
    ]
    smooth = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
    moderate = [
        A.D4(p=1),  # flips and quarter turns
        Warp(MODERATE_SCALE, p=0.5),
        StainJitter(p=0.4),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.4),
        A.OneOf(
            [A.GaussianBlur(sigma_limit=(0.3, 1.3), p=1), A.Sharpen(alpha=(0.1, 0.4), p=1)], p=0.2
        ),
    ]
    strong = [
        PaleNuclei(p=0.5),
        A.D4(p=1),
        Warp(STRONG_SCALE, p=0.6),
        StainJitter(p=0.8),
        A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=20, val_shift_limit=0, p=0.3),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.4),
        A.RandomGamma(gamma_limit=(70, 140), p=0.3),
        A.OneOf(
            [
                A.GaussianBlur(sigma_limit=(0.3, 1.3), p=1),
                A.Downscale(scale_range=(0.5, 0.8), interpolation_pair=smooth, p=0.5),
                A.Sharpen(alpha=(0.1, 0.4), p=0.5),
            ],
            p=0.3,
        ),
        A.GaussNoise(std_range=(0.01, 0.05), noise_scale_factor=1, p=0.2),
        A.ImageCompression(quality_range=(40, 95), p=0.2),
    ]
    to_input = [A.Normalize(IMAGENET_MEAN, IMAGENET_STD), ToTensorV2()]
    train = {"basic": basic, "moderate": moderate, "strong": strong}[augment] + to_input
    return A.Compose({"train": train, "val": to_input}[split])
