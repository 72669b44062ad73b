"""Images as what they are: their shape, their names, and nothing bent into RGB."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vla_bench.data.images import check_video, decode_image, image_shape, not_rgb
from vla_bench.data.lerobot import LeRobotDataset, validate
from vla_bench.data.paths import DatasetError
from vla_bench.data.schema import Feature

KEYS = [f"observation.images.{kind}.left_wrist" for kind in ("rgb", "depth", "seg_instance_id")]


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([48, 64, 3], ("height", "width", "channels")),
        ([48, 64, 3], None),
        ([48, 64, 3], ("height", "width", "rgb")),
        ([3, 48, 64], ("channels", "height", "width")),
        ([3, 48, 64], ("channel", "height", "width")),
        ([3, 48, 64], None),
        ([64, 48, 3], ("width", "height", "channels")),
        ([64, 48, 3], ("W", "H", "C")),
    ],
    ids=str,
)
def test_the_names_of_the_axes_say_what_is_high_and_wide(make, tmp_path, shape, names):
    features = make.PLAIN | {make.TOP: make.camera(shape, names)}
    encoder = lambda path, frames, fps: make.encode(path, [make.level(0)] * len(frames), fps)
    dataset = LeRobotDataset(make.v21(tmp_path / "ds", features=features, encoder=encoder))
    assert dataset[0]["image"][0].size == (64, 48) and dataset.image_size == (48, 64)


def three_kinds(make, root, **more):
    features = {"action": make.vector(3), "observation.state": make.vector(3)}
    features |= {key: make.camera(**more.get(key, {})) for key in KEYS}
    return make.v21(root, features=features)


def test_a_short_name_of_several_cameras_is_refused(make, tmp_path):
    root = three_kinds(make, tmp_path / "ds")
    with pytest.raises(DatasetError, match=f"'left_wrist' may be any of {', '.join(KEYS)}"):
        LeRobotDataset(root, cameras=["left_wrist"])


@pytest.mark.parametrize("name", [KEYS[0], "rgb.left_wrist", "images.rgb.left_wrist"])
def test_full_names_and_ends_that_fit_one_camera_work(make, tmp_path, name):
    assert LeRobotDataset(three_kinds(make, tmp_path / "ds"), cameras=[name])._keys == [KEYS[0]]


def test_cameras_of_a_dataset_have_distinct_names_that_can_be_asked_for(make, tmp_path):
    root = three_kinds(make, tmp_path / "ds")
    names = LeRobotDataset(root).cameras
    assert names == ("rgb.left_wrist", "depth.left_wrist", "seg_instance_id.left_wrist")
    assert LeRobotDataset(root, cameras=names)._keys == KEYS


def test_a_gr00t_name_that_is_another_cameras_end_is_ambiguous(make, tmp_path):
    features = make.PLAIN | {"observation.images.wrist": make.camera()}
    modality = {"video": {"wrist": {"original_key": make.TOP}}}
    root = make.v21(tmp_path / "ds", features=features, modality=modality)
    with pytest.raises(DatasetError, match="'wrist' may be any of"):
        LeRobotDataset(root, cameras=["wrist"])
    names = LeRobotDataset(root).cameras
    assert len(set(names)) == 2 and LeRobotDataset(root, cameras=names)._keys == [
        make.TOP,
        "observation.images.wrist",
    ]


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"info": {"video.is_depth_map": True}}, "holds depth"),
        ({"info": {"is_depth_map": True}}, "holds depth"),
        ({"video_info": {"video.is_depth_map": True}}, "holds depth"),
        ({"info": {"video.channels": 1}}, "has 1 channels"),
        ({"info": {"video.pix_fmt": "gray12le"}}, "pixel format gray12le"),
        ({"shape": [48, 64, 1]}, "has 1 channels"),
        ({"shape": [1, 48, 64], "names": ("channels", "height", "width")}, "has 1 channels"),
        ({"shape": [48, 64, 4]}, "has 4 channels"),
    ],
    ids=str,
)
def test_a_camera_that_is_declared_to_be_no_rgb_is_refused_and_the_others_are_offered(
    make, tmp_path, declared, reason
):
    root = three_kinds(make, tmp_path / "ds", **{KEYS[1]: declared})
    for cameras in (None, [KEYS[1]]):
        with pytest.raises(DatasetError, match=f"{KEYS[1]}.* {reason}.*{KEYS[0]}, {KEYS[2]}"):
            LeRobotDataset(root, cameras=cameras)
    assert LeRobotDataset(root, cameras=[KEYS[0]])[0]["image"][0].mode == "RGB"
    assert validate(root) == []


@pytest.mark.parametrize(
    "array",
    [
        np.full((48, 64), 800, np.uint16),
        np.full((48, 64), 80, np.uint8),
        np.full((48, 64, 4), 80, np.uint8),
    ],
    ids=["16 bits", "grey", "transparent"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_stored_images_that_are_no_rgb_are_refused(make, tmp_path, array, channels):
    features = {n: f for n, f in make.PLAIN.items() if n != make.TOP}
    features["observation.images.depth"] = make.camera([48, 64, channels], dtype="image")
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra["observation.images.depth"] = lambda i: make.png(array)
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    with pytest.raises(DatasetError, match="observation.images.depth"):
        LeRobotDataset(root)[0]
    assert validate(root)


def test_cameras_of_different_sizes_have_a_size_each(make, tmp_path):
    features = make.PLAIN | {"observation.images.wrist": make.camera([32, 36, 3])}
    dataset = LeRobotDataset(make.v21(tmp_path / "ds", features=features))
    assert dataset.image_size == ((48, 64), (32, 36))
    assert [image.size for image in dataset[0]["image"]] == [(64, 48), (36, 32)]


def deep_png() -> dict:
    """48 x 64 pixels of 16 bits per colour, which Pillow opens as if they had eight."""
    rows = b"".join(b"\0" + np.full((64, 3), 800, ">u2").tobytes() for _ in range(48))
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(parts), "path": None}


def test_colours_of_16_bits_are_refused(make, tmp_path):
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {
        "action": make.counting(3),
        "observation.state": make.counting(3),
        make.TOP: lambda i: deep_png(),
    }
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    with pytest.raises(DatasetError, match="frame 0 of observation.images.top is an image of kind .*16 bits"):
        LeRobotDataset(root)[0]


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM"])
def test_stored_images_are_png_jpeg_or_webp(make, tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(make.level(3)).save(buffer, kind)
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra[make.TOP] = lambda i: {"bytes": buffer.getvalue(), "path": None}
    with pytest.raises(DatasetError, match="bytes that are no PNG or JPEG or WEBP image"):
        LeRobotDataset(make.v21(tmp_path / "ds", features=features, extra=extra))[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_stored_images_of_these_kinds_are_read(make, tmp_path, kind):
    def stored(i):
        buffer = io.BytesIO()
        Image.fromarray(make.level(i)).save(buffer, kind)
        return {"bytes": buffer.getvalue(), "path": None}

    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {"action": make.counting(3), "observation.state": make.counting(3), make.TOP: stored}
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    dataset = LeRobotDataset(root)
    assert [make.level_of(dataset[i]["image"][0]) for i in (7, 0, 10)] == [7, 0, 10]
    assert validate(root) == []


H, W = 48, 64
UNNAMED = [
    *(([H, W, channels], (H, W, channels)) for channels in (1, 2, 3, 4)),
    *(([channels, H, W], (H, W, channels)) for channels in (1, 3, 4)),
    ([3, 4, 3], (3, 4, 3)),
    ([H, W], (H, W, 1)),
]


@pytest.mark.parametrize("shape, expected", UNNAMED, ids=str)
@pytest.mark.parametrize(
    "names", [None, ["a", "b", "c"], ["height", "width"], ["height", "height", "channels"]], ids=str
)
def test_without_names_few_channels_stand_last_or_first(shape, expected, names):
    if len(shape) == 2 and names and len(names) == 2:
        names = None
    assert image_shape(Feature(dtype="video", shape=shape, names=names), "here") == expected


@pytest.mark.parametrize(
    "shape", [[H, W, 5], [2, H, W], [0, W, 3], [H, 0, 3], [H], [1, H, W, 3], None], ids=str
)
def test_a_shape_that_no_image_has_is_refused(shape):
    with pytest.raises(DatasetError, match="^here has shape"):
        image_shape(Feature(dtype="video", shape=shape), "here")


TOLD = [
    ({}, 3, None),
    ({"info": {"video.is_depth_map": True}}, 3, "holds depth"),
    ({"info": {"is_depth_map": True}}, 3, "holds depth"),
    ({"video_info": {"video.is_depth_map": True}}, 3, "holds depth"),
    ({"info": {"is_depth_map": False}}, 3, None),
    ({}, 1, "has 1 channels"),
    ({"info": {"video.channels": 4}}, 3, "has 4 channels"),
    ({"info": {"video.channels": 3}}, 3, None),
    *(
        ({"info": {"video.pix_fmt": name}}, 3, f"has the pixel format {name}")
        for name in ("gray", "gray16le", "monob", "ya8")
    ),
    *(({"info": {"video.pix_fmt": name}}, 3, None) for name in ("yuv420p", "rgb24")),
    ({"video_info": {"is_depth_map": True}, "info": {"is_depth_map": False}}, 3, None),
]


@pytest.mark.parametrize("told, channels, reason", TOLD, ids=str)
def test_why_a_camera_is_no_rgb(told, channels, reason):
    assert not_rgb(Feature(dtype="video", shape=[H, W, channels], **told), "here") == reason


def entry(make, tmp_path, value, column: str = "image"):
    """A dataset whose images stand in the parquet file, each row's `value(row)`."""
    features = {
        "action": make.vector(3),
        "observation.state": make.vector(3),
        "cam": make.camera((4, 6, 3), dtype="image"),
    }
    plain = {"action": make.counting(3), "observation.state": make.counting(3)}
    return LeRobotDataset(make.v21(tmp_path / "ds", features=features, extra=plain | {"cam": value}))


def test_stored_images_are_those_of_their_rows_in_any_form(make, tmp_path):
    plain = lambda row: np.full((4, 6, 3), 20 * row, np.uint8)
    forms = {"struct": lambda row: make.png(plain(row)), "bytes": lambda row: make.png(plain(row))["bytes"]}
    for name, value in forms.items():
        dataset = entry(make, tmp_path / name, value)
        assert [np.asarray(dataset[row]["image"][0]).max() for row in range(11)] == [
            20 * row for row in range(11)
        ]


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, {"other": "a"}, "text"], ids=str)
def test_a_row_without_an_image_is_named(make, tmp_path, value):
    dataset = entry(make, tmp_path, lambda row: value)
    with pytest.raises(
        DatasetError, match="episode 0 frame 0 of cam: .*neither the bytes of an image nor a path"
    ):
        dataset[0]


def test_an_image_of_another_size_is_named(make, tmp_path):
    dataset = entry(make, tmp_path, lambda row: make.png(np.zeros((6, 4, 3), np.uint8)))
    with pytest.raises(DatasetError, match=r"episode 1 frame 2 of cam is \[6, 4\], info.json says \[4, 6\]"):
        dataset[8]


def test_a_palette_and_an_opaque_alpha_are_rgb(make, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)

    def stored(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    opaque, clear = Image.fromarray(noise).convert("RGBA"), Image.fromarray(noise).convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 254))
    assert (np.asarray(decode_image(stored(opaque), (4, 6), "here")) == noise).all()
    palette = Image.fromarray(noise).quantize(256)
    assert (
        np.asarray(decode_image(stored(palette), (4, 6), "here")) == np.asarray(palette.convert("RGB"))
    ).all()
    with pytest.raises(DatasetError, match="here is an image of kind RGBA, expected RGB with 8 bits"):
        decode_image(stored(clear), (4, 6), "here")
    with pytest.raises(DatasetError, match="here holds 5 bytes that are no PNG or JPEG or WEBP image"):
        decode_image(b"12345", (4, 6), "here")


def test_a_video_is_compared_in_height_and_width():
    video = SimpleNamespace(path="a.mp4", height=4, width=6, pix_fmt="yuv420p")
    check_video(video, (4, 6))
    for size in ((6, 4), (4, 8), (2, 6)):
        with pytest.raises(
            DatasetError, match=rf"a.mp4 is \[4, 6\], info.json says \[{size[0]}, {size[1]}\]"
        ):
            check_video(video, size)
    for name in ("gray", "gray10le", "monow", "ya8"):
        video.pix_fmt = name
        with pytest.raises(DatasetError, match=f"a.mp4 has the pixel format {name}, expected a colour video"):
            check_video(video, (4, 6))


def test_a_camera_that_is_named_twice_is_refused(make, tmp_path):
    root = make.v21(tmp_path / "ds")
    with pytest.raises(DatasetError, match="'observation.images.top' is named twice in"):
        LeRobotDataset(root, cameras=["top", make.TOP])
    with pytest.raises(DatasetError, match="no camera 'tpo'; did you mean 'top'"):
        LeRobotDataset(root, cameras=["tpo"])
    with pytest.raises(DatasetError, match="no camera ''"):
        LeRobotDataset(root, cameras=[""])
