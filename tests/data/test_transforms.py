"""What is done to images, pixel by pixel; what training draws; and which settings cannot be."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vla_bench.data.transforms import (
    FILTERS,
    METHODS,
    NO_TRANSFORMS,
    TRANSFORMS,
    ColorJitter,
    Crop,
    ImageTransforms,
    Pad,
    RandomShift,
    Resize,
    resize_image,
    shift_image,
    transform_sample,
    transforms_from_list,
)


def picture(height=20, width=30, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and (pixels(one) == pixels(other)).all()


def test_the_choices_are_these():
    assert set(FILTERS) == {"nearest", "bilinear", "bicubic", "lanczos"} and METHODS == (
        "stretch",
        "pad",
        "crop",
    )
    assert TRANSFORMS == {
        "resize": Resize,
        "pad": Pad,
        "crop": Crop,
        "shift": RandomShift,
        "color_jitter": ColorJitter,
    }
    assert [FILTERS[name] for name in FILTERS] == [Image.Resampling[name.upper()] for name in FILTERS]


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("size", [(10, 15), (40, 24), (20, 60)])
def test_stretching_is_pillows(filter, size):
    image = picture()
    expected = image.resize(size[::-1], FILTERS[filter])
    assert same(resize_image(image, *size, "stretch", filter), expected)


@pytest.mark.parametrize(
    "size, box",
    [
        ((20, 20), (5, 0, 25, 20)),
        ((40, 30), (7.5, 0, 22.5, 20)),
        ((10, 30), (0, 5, 30, 15)),
        ((8, 30), (0, 6, 30, 14)),
    ],
)
def test_cropping_keeps_the_middle_and_the_proportions(size, box):
    image = picture()
    expected = image.resize(size[::-1], FILTERS["bilinear"], box=box)
    assert same(resize_image(image, *size, "crop", "bilinear"), expected)


@pytest.mark.parametrize(
    "size, inner, corner",
    [((30, 30), (20, 30), (5, 0)), ((20, 60), (20, 30), (0, 15)), ((10, 60), (10, 15), (0, 22)), ((25, 15), (10, 15), (7, 0)), ((1, 200), (1, 2), (0, 99))],
)  # fmt: skip
def test_padding_keeps_all_of_it_in_the_middle_of_black(size, inner, corner):
    image = picture()
    expected = np.zeros((*size, 3), int)
    (top, left), (height, width) = corner, inner
    expected[top : top + height, left : left + width] = pixels(image.resize(inner[::-1], FILTERS["nearest"]))
    assert (pixels(resize_image(image, *size, "pad", "nearest")) == expected).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_image_of_the_right_size_keeps_every_bit(method):
    image = picture()
    assert resize_image(image, 20, 30, method, "lanczos") is image


@pytest.mark.parametrize(
    "down, right", [(0, 0), (3, 0), (-3, 0), (0, 4), (0, -4), (2, -5), (-2, 5), (50, 50), (-50, -50)]
)
def test_a_shift_repeats_the_border(down, right):
    image = picture()
    y, x = np.clip(np.arange(20) - down, 0, 19), np.clip(np.arange(30) - right, 0, 29)
    assert (pixels(shift_image(image, down, right)) == pixels(image)[y][:, x]).all()


def test_a_random_shift_draws_down_and_right_up_to_the_bound_for_all_cameras_alike():
    image, drawn = picture(), set()
    for seed in range(60):
        found = RandomShift(2).train([image, image], np.random.default_rng(seed))
        down, right = np.random.default_rng(seed).integers(-2, 3, size=2)
        assert all(same(each, shift_image(image, int(down), int(right))) for each in found)
        drawn |= {(int(down), int(right))}
    assert {d for d, _ in drawn} == {r for _, r in drawn} == {-2, -1, 0, 1, 2}
    images = [image]
    assert RandomShift(2).eval(images) is images


@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_a_crop_cuts_the_same_part_of_all_cameras_and_the_middle_afterwards(fraction):
    image, wide = picture(), picture(10, 40, 1)
    down, right = np.random.default_rng(3).random(2)
    drawn = Crop(fraction, "bilinear").train([image, wide], np.random.default_rng(3))
    fixed = Crop(fraction, "bilinear").eval([image, wide])
    for (y, x), found in (((down, right), drawn), ((0.5, 0.5), fixed)):
        for each, result in zip((image, wide), found, strict=True):
            w, h = each.size
            left, top = x * (1 - fraction) * w, y * (1 - fraction) * h
            box = (left, top, left + fraction * w, top + fraction * h)
            assert same(result, each.resize((w, h), FILTERS["bilinear"], box=box))
    assert down != right


JITTER = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_jitter_alone_is_its_enhancement_by_the_drawn_factor(which, seed):
    image, (name, kind) = picture(), list(JITTER.items())[which]
    factor = 1 + 0.4 * np.random.default_rng(seed).uniform(-1, 1, 4)[which]
    (found,) = ColorJitter(**{name: 0.4}).train([image], np.random.default_rng(seed))
    assert same(found, kind(image).enhance(factor)) and not same(found, image)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_hue_turns_the_circle(seed):
    image = picture()
    turns = 0.5 * np.random.default_rng(seed).uniform(-1, 1, 4)[3]
    (found,) = ColorJitter(hue=0.5).train([image], np.random.default_rng(seed))
    hsv = np.asarray(image.convert("HSV")).astype(int)
    hsv[..., 0] = (hsv[..., 0] + round(turns * 255)) % 256
    assert same(found, Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


def test_a_jitter_of_nothing_and_one_afterwards_leave_images_alone():
    image = picture()
    assert ColorJitter().train([image], np.random.default_rng(0))[0] is image
    images = [image]
    assert ColorJitter(0.5, 0.5, 0.5, 0.5).eval(images) is images


def test_jitters_come_one_after_another_and_alike_for_all_cameras():
    image, rng = picture(), np.random.default_rng(4)
    drawn = np.random.default_rng(4).uniform(-1, 1, 4)
    expected = image
    for kind, part, value in zip(JITTER.values(), (0.1, 0.2, 0.3), drawn):
        expected = kind(expected).enhance(1 + part * value)
    found = ColorJitter(0.1, 0.2, 0.3).train([image, image], rng)
    assert same(found[0], expected) and same(found[1], expected)


STEPS = ImageTransforms((Resize(16, 16), Crop(0.5), RandomShift(3), ColorJitter(brightness=0.5)))


def test_a_group_is_its_steps_one_after_another():
    image = picture()
    one, other = np.random.default_rng(2), np.random.default_rng(2)
    images = [image]
    for step in STEPS.steps:
        images = step.train(images, other)
    assert same(STEPS.train([image], one)[0], images[0])
    assert same(STEPS.eval([image])[0], Crop(0.5).eval(Resize(16, 16).eval([image]))[0])
    assert NO_TRANSFORMS.eval([image])[0] is image and NO_TRANSFORMS.steps == ()


def test_a_resize_is_the_same_in_training():
    image, rng = picture(), np.random.default_rng(0)
    before = rng.bit_generator.state
    resize = Resize(7, 9, "pad", "nearest")
    assert same(resize.train([image], rng)[0], resize_image(image, 7, 9, "pad", "nearest"))
    assert same(resize.eval([image])[0], resize_image(image, 7, 9, "pad", "nearest"))
    assert rng.bit_generator.state == before


GROUP = [
    {"type": "resize", "height": 16, "width": 8, "method": "pad", "filter": "nearest"},
    {"type": "crop", "fraction": 0.75, "filter": "lanczos"},
    {"type": "shift", "pixels": 4},
    {"type": "color_jitter", "brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.4},
]


def test_a_list_becomes_a_group_and_the_list_again():
    group = transforms_from_list(GROUP, "key")
    assert group.steps == (
        Resize(16, 8, "pad", "nearest"), Crop(0.75, "lanczos"), RandomShift(4), ColorJitter(0.1, 0.2, 0.3, 0.4)
    )  # fmt: skip
    assert group.to_list() == GROUP and transforms_from_list(tuple(GROUP), "key") == group
    assert transforms_from_list(None, "key") == transforms_from_list([], "key") == NO_TRANSFORMS


REFUSED = [
    ({"type": "crop", "fraction": 0.0}, "fraction is 0.0, expected 0.01 … 1"),
    ({"type": "crop", "fraction": 1.01}, "fraction is 1.01"),
    ({"type": "crop", "filter": "cubic"}, "unknown filter 'cubic'"),
    ({"type": "resize", "height": 0, "width": 8}, "height is 0, expected 1 … 16384"),
    ({"type": "resize", "height": 8, "width": 0}, "width is 0"),
    ({"type": "resize", "height": 16385, "width": 8}, "height is 16385"),
    ({"type": "resize", "height": 8, "width": 16385}, "width is 16385"),
    (
        {"type": "resize", "height": 8, "width": 8, "method": "pda"},
        "unknown method 'pda'; did you mean 'pad'",
    ),
    ({"type": "resize", "height": 8, "width": 8, "filter": "bicubci"}, "did you mean 'bicubic'"),
    ({"type": "resize", "height": 8}, "width"),
    ({"type": "shift", "pixels": -1}, "pixels is -1, expected 0 … 16384"),
    ({"type": "shift", "pixels": 16385}, "pixels is 16385"),
    *(({"type": "color_jitter", name: -0.1}, f"{name} is -0.1") for name in (*JITTER, "hue")),
    *(({"type": "color_jitter", name: 1.1}, f"{name} is 1.1, expected 0 … 1") for name in JITTER),
    ({"type": "color_jitter", "hue": 0.6}, "hue is 0.6, expected 0 … 0.5"),
    ({"type": "crp"}, "unknown type 'crp'; did you mean 'crop'"),
    ({"type": "crop", "fracton": 0.5}, "crop has no 'fracton'; did you mean 'fraction'"),
    ({"fraction": 0.5}, "has no 'type'"),
    ("crop", "has no 'type'"),
    ({"type": "crop", "fraction": "half"}, "'fraction'"),
]


@pytest.mark.parametrize("step, message", REFUSED, ids=lambda value: str(value)[:50])
def test_a_step_that_cannot_be_is_named_by_its_place(step, message):
    with pytest.raises(ValueError) as error:
        transforms_from_list([GROUP[1], step], "key")
    assert str(error.value).startswith("key[1]") and message in str(error.value)


@pytest.mark.parametrize("content", ["crop", {"type": "crop"}, 3])
def test_what_is_no_list_is_refused(content):
    with pytest.raises(ValueError, match="^key is .*expected a list of transforms"):
        transforms_from_list(content, "key")


@pytest.mark.parametrize(
    "step", [Crop(1.0), Crop(0.01), Resize(1, 1), Resize(1 << 14, 1 << 14), RandomShift(0), RandomShift(1 << 14), ColorJitter(1, 1, 1, 0.5)]
)  # fmt: skip
def test_the_ends_of_a_range_are_taken(step):
    assert step in ImageTransforms((step,)).steps


def test_later_images_are_drawn_for_with_the_present_ones():
    sample = {"image": [picture(), picture(seed=1)], "future": [picture(seed=2)], "lang": "go", "state": 1}
    for rng in (None, np.random.default_rng(6)):
        found = transform_sample(sample, STEPS, rng)
        together = [*sample["image"], *sample["future"]]
        expected = STEPS.eval(together) if rng is None else STEPS.train(together, np.random.default_rng(6))
        assert [len(found["image"]), len(found["future"])] == [2, 1]
        assert all(map(same, [*found["image"], *found["future"]], expected))
        assert (found["lang"], found["state"]) == ("go", 1) and len(sample["image"]) == 2
    assert "future" not in transform_sample({"image": [picture()]}, STEPS)


@pytest.mark.parametrize("height, width", [(20, 30), (21, 33), (40, 30), (27, 64)])
def test_a_pad_frames_the_image_in_its_middle(height, width):
    image, value = picture(), 9
    framed = pixels(Pad(height, width, value).eval([image])[0])
    top, left = (height - image.height) // 2, (width - image.width) // 2
    expected = np.full((height, width, 3), value)
    expected[top : top + image.height, left : left + image.width] = pixels(image)
    assert (framed == expected).all()
    assert same(Pad(height, width, value).train([image], None)[0], Image.fromarray(framed.astype(np.uint8)))


@pytest.mark.parametrize("height, width", [(19, 30), (20, 29)])
def test_a_pad_that_is_smaller_than_the_image_is_refused(height, width):
    with pytest.raises(ValueError, match=f"an image of 20 x 30 is larger than {height} x {width}"):
        Pad(height, width).eval([picture()])
