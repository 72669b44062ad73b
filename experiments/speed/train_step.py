"""One training step and one prediction of OFT, at the size of the quickstart or of Qwen2.5-VL-3B.

python experiments/speed/train_step.py [--shape qwen2_5_vl_3b]

The 3B shape is randomly initialised from transformers' own configuration class, so nothing is downloaded: fp32 master
weights, bf16 autocast, fused AdamW, batch 8, two images of 224 x 224. It needs a GPU with about 70 GiB.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla_bench.data.sample import Sample
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.processor import load_processor
from vla_bench.models.backbones.qwen import QwenVL
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.oft import OFT
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.mlp import MLPHead

SHAPES = {  # batch, images per sample, side in pixels
    "quickstart": (64, 1, 96),
    "qwen2_5_vl_3b": (8, 2, 224),
}


def backbone(shape: str, side: int, device: torch.device) -> VLM:
    """The tiny checkpoint, or a model of the 3B's shape with the tiny processor in its patch size."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny("qwen2_5_vl", folder, image_size=side)
        if shape == "quickstart":
            return load_vlm(folder).to(device)
        processor = load_processor(folder)
    processor.image_processor.patch_size = 14
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    vision |= {"out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": token(literal) for name, literal in names.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        return QwenVL(Qwen2_5_VLForConditionalGeneration(config), processor)


def timed(call, device: torch.device, repeats: int) -> float:
    """The best of several calls, in seconds, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if _ else float("inf")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if options.shape == "qwen2_5_vl_3b" and not gpu:
        parser.error("a training step of 3 billion parameters needs a GPU, and torch sees none here")
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(1 if not gpu else torch.get_num_threads())
    size, cameras, side = SHAPES[options.shape]
    vlm = backbone(options.shape, side, device)
    sizes = HeadSizes(vlm.hidden_size, action_dim=7, horizon=8, state_dim=8)
    model = OFT(vlm, MLPHead(sizes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    rng = np.random.default_rng(0)

    def sample() -> Sample:
        images = [Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(cameras)]
        chunk = {"action": rng.uniform(-1, 1, (8, 7)).astype(np.float32), "action_is_pad": np.zeros(8, bool)}
        return Sample(image=images, lang="open the drawer", state=np.zeros(8, np.float32), **chunk)

    batch = model.prepare([sample() for _ in range(size)])
    observation = model.prepare([sample()])

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            loss = model(batch)["action_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def predict() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            model.predict_action(observation)

    train_s, predict_s = timed(step, device, options.repeats), timed(predict, device, options.repeats)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{options.shape} on {device}: {count:,.1f} M parameters, batch {size}, {cameras} x {side} px")
    print(f"  training step {1000 * train_s:8.1f} ms   {size / train_s:8.1f} samples/s")
    print(f"  prediction    {1000 * predict_s:8.1f} ms")
    if gpu:
        print(f"  peak memory   {torch.cuda.max_memory_allocated() / 2**30:8.1f} GiB")


if __name__ == "__main__":
    main()
