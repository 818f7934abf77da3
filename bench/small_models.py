"""Models with random weights, one of each kind that people train, each with a loss: for comparing devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """What the transformers have; the convolutional network has ``width`` channels in its first stage."""

    width: int
    depth: int
    num_heads: int
    vocabulary: int
    batch: int
    length: int  # tokens of a sequence


TINY = Size(width=32, depth=2, num_heads=4, vocabulary=128, batch=2, length=16)
TWENTY_MILLION = Size(width=384, depth=9, num_heads=6, vocabulary=8192, batch=4, length=64)


@dataclass(frozen=True, slots=True)
class Case:
    """A model on the CPU, a batch for it, and its loss."""

    model: nn.Module
    inputs: Inputs
    loss: Callable[[nn.Module, Inputs], Tensor]

    def inputs_on(self, device: str) -> Inputs:
        return {name: tensor.to(device) for name, tensor in self.inputs.items()}

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.model.parameters())


def gpt2(size: Size) -> Case:
    import transformers

    config = transformers.GPT2Config(
        n_embd=size.width, n_layer=size.depth, n_head=size.num_heads, vocab_size=size.vocabulary,
        n_positions=size.length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _language_model(transformers.GPT2LMHeadModel(config), size)


def llama(size: Size) -> Case:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        intermediate_size=8 * size.width // 3, vocab_size=size.vocabulary, max_position_embeddings=size.length,
    )  # fmt: skip
    return _language_model(transformers.LlamaForCausalLM(config), size)


def qwen_moe(size: Size) -> Case:
    import transformers

    config = transformers.Qwen2MoeConfig(
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads, intermediate_size=2 * size.width, moe_intermediate_size=size.width,
        shared_expert_intermediate_size=size.width, num_experts=4, num_experts_per_tok=2, vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
    )  # fmt: skip
    return _language_model(transformers.Qwen2MoeForCausalLM(config), size)


def vit(size: Size) -> Case:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        intermediate_size=4 * size.width, image_size=32, patch_size=4, num_labels=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def loss(model: nn.Module, inputs: Inputs) -> Tensor:
        return F.cross_entropy(model(pixel_values=inputs["images"]).logits, inputs["labels"])

    return Case(transformers.ViTForImageClassification(config), _images(size), loss)


def diffusion_transformer(size: Size) -> Case:
    images = torch.randn(size.batch, 3, 16, 16)
    inputs = {"images": images, "times": torch.rand(size.batch), "noise": torch.randn_like(images)}

    def loss(model: nn.Module, inputs: Inputs) -> Tensor:
        return F.mse_loss(model(inputs["images"] + inputs["noise"], inputs["times"]), inputs["noise"])

    return Case(DiffusionTransformer(size), inputs, loss)


def resnet(size: Size) -> Case:
    def loss(model: nn.Module, inputs: Inputs) -> Tensor:
        return F.cross_entropy(model(inputs["images"]), inputs["labels"])

    return Case(ResNet(size.width), _images(size), loss)


MODELS: dict[str, Callable[[Size], Case]] = {
    "llama": llama, "gpt2": gpt2, "qwen_moe": qwen_moe, "vit": vit, "diffusion_transformer": diffusion_transformer,
    "resnet": resnet,
}  # fmt: skip
DENSE_TRANSFORMERS = ("llama", "gpt2", "vit", "diffusion_transformer")  # whose step has nothing to wait for


def _language_model(model: nn.Module, size: Size) -> Case:
    tokens = torch.randint(0, size.vocabulary, (size.batch, size.length))
    # A mask of its own: transformers would look into a padding mask, or for packed sequences, and wait for the answer.
    mask = torch.full((size.length, size.length), -math.inf).triu(1).expand(size.batch, 1, -1, -1)

    def loss(model: nn.Module, inputs: Inputs) -> Tensor:
        tokens = inputs["tokens"]
        loss: Tensor = model(input_ids=tokens, attention_mask=inputs["mask"], labels=tokens, use_cache=False).loss
        return loss

    return Case(model, {"tokens": tokens, "mask": mask.contiguous()}, loss)


def _images(size: Size) -> Inputs:
    return {"images": torch.randn(size.batch, 3, 32, 32), "labels": torch.randint(0, 10, (size.batch,))}


class DiffusionBlock(nn.Module):
    """Attention and a feed-forward layer, both scaled, shifted and gated by the time (Peebles and Xie, 2212.09748)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query_key_value, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_after, scale_after, gate_after = self.modulation(time)[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + gate_after * self.feed_forward(self.norm(x) * (1 + scale_after) + shift_after)

    def attention(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(*heads.unbind()).transpose(1, 2).flatten(2))


class DiffusionTransformer(nn.Module):
    """Predicts the noise of images of shape (N, 3, 16, 16) at times of shape (N,)."""

    PATCH = 4

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, size.width, self.PATCH, stride=self.PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(16, size.width))
        self.time = nn.Sequential(nn.Linear(size.width, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        self.blocks = nn.ModuleList(DiffusionBlock(size.width, size.num_heads) for _ in range(size.depth))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, 3 * self.PATCH**2)
        frequencies = torch.exp(-math.log(1e4) * torch.arange(size.width // 2) / (size.width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, time)
        return F.fold(self.head(self.norm(x)).transpose(1, 2), images.shape[-2:], self.PATCH, stride=self.PATCH)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        is_same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Three stages of two blocks for images of shape (N, 3, 32, 32), 10 classes."""

    def __init__(self, width: int) -> None:
        stages = [
            block
            for stage, channels in enumerate((width, 2 * width, 4 * width))
            for block in (
                ResidualBlock(width if stage == 0 else channels // 2, channels, stride=1 if stage == 0 else 2),
                ResidualBlock(channels, channels, stride=1),
            )
        ]
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), *stages,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
        )  # fmt: skip
