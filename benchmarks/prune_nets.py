"""The networks that structured pruning is tried on: 80 of torchvision, 100 CNN families of timm."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.nets import import_torchvision_models, settle_batch_norms

CLASSIFIERS = """
alexnet convnext_base convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet
inception_v3 mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf
regnet_x_800mf regnet_x_8gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d
resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11
vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 wide_resnet101_2 wide_resnet50_2
""".split()  # noqa: SIM905
"""All of torchvision's but the five largest (vit_h_14, regnet_y_128gf, vit_l_16, vit_l_32, convnext_large)
and maxvit_t.
"""

SEGMENTATION = [
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet101",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
]

TIMM = """
resnet10t ecaresnet26t legacy_seresnet18 skresnet18 resnest14d res2net50_14w_8s resnetv2_18
resnetv2_50x1_bit nf_resnet26 nf_regnet_b0 eca_nfnet_l0 regnetx_002 regnety_002 regnetz_005 regnetz_b16
regnetv_040 gernet_s repvgg_a0 mobileone_s0 resnet33ts gcresnet33ts bat_resnext26ts botnet26t_256
halonet26t lambda_resnet26t resnet50_clip_gap convmixer_1024_20_ks9_p14 convnext_atto convnextv2_atto
cspresnet50 cspdarknet53 cs3darknet_s darknet21 cspnext_tiny densenetblur121d rdnet_tiny dla34
dla60_res2net dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0
efficientnet_es efficientnetv2_rw_t efficientnet_b0_gn fbnetc_100 mixnet_s mnasnet_small mobilenetv2_035
spnasnet_100 tinynet_e efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf
ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small
inception_next_atto inception_resnet_v2 inception_v4 lcnet_035 lcnetv2_small lowformer_b0 mambaout_femto
poolformer_s12 poolformerv2_s12 convformer_s18 mobilenetv3_small_050 fbnetv3_b
mobilenetv4_conv_small_035 mobilevit_xxs mobilevitv2_050 nasnetalarge pnasnet5large nextvit_small
repghostnet_050 repvit_m0_9 rexnet_100 selecsls42b shvit_s1 starnet_s050 swiftformer_xs tresnet_m
vovnet39a ese_vovnet19b_dw xception xception41 visformer_tiny iformer_t csatv2 cpubone_nano
mobilenetv1_100 resnetrs50
""".split()  # noqa: SIM905

SUITES: dict[str, list[str]] = {
    "torchvision": [f"torchvision:{name}" for name in (*CLASSIFIERS, *SEGMENTATION)],
    "timm": [f"timm:{name}" for name in TIMM],
}

_SIDES = {  # what a network needs; the others run on 64 x 64
    **{f"torchvision:vit_b_{patch}": 224 for patch in (16, 32)},
    **{f"torchvision:swin{name}": 224 for name in ("_t", "_s", "_b", "_v2_t", "_v2_s", "_v2_b")},
    "torchvision:inception_v3": 96,
    "torchvision:googlenet": 96,
    "torchvision:alexnet": 224,
    **{f"torchvision:vgg{depth}{norm}": 224 for depth in (11, 13, 16, 19) for norm in ("", "_bn")},
    "torchvision:squeezenet1_0": 96,
    "torchvision:squeezenet1_1": 96,
    "timm:inception_v4": 96,
    "timm:inception_resnet_v2": 96,
    "timm:nasnetalarge": 96,
    "timm:pnasnet5large": 96,
    "timm:xception": 96,
    "timm:convmixer_1024_20_ks9_p14": 112,
    **{
        f"timm:{name}": 224
        for name in ("efficientformer_l1", "efficientformerv2_s0", "visformer_tiny", "nextvit_small")
    },
    **{
        f"timm:{name}": 224
        for name in ("efficientvit_m0", "iformer_t", "focalnet_tiny_srf", "swiftformer_xs")
    },
    **{
        f"timm:{name}": 256
        for name in (
            "botnet26t_256",
            "bat_resnext26ts",
            "halonet26t",
            "lambda_resnet26t",
            "csatv2",
            "fastvit_t8",
        )
    },
    **{
        f"timm:{name}": 128
        for name in ("mobilevit_xxs", "mobilevitv2_050", "efficientvit_b0", "shvit_s1", "lowformer_b0")
    },
    **{f"timm:{name}": 128 for name in ("edgenext_xx_small", "cpubone_nano", "mambaout_femto")},
}


def side_of(name: str) -> int:
    """Return the height and width of the images a network is tried with."""
    return _SIDES.get(name, 64)


def build(name: str) -> nn.Module:
    """Return "torchvision:NAME" or "timm:NAME" with seeded random weights, in eval mode.

    No parameter is left constant and small (biases, heads and layer scales begin at 0 or 1e-6), and its
    BatchNorms get the statistics of two images: a fresh network is all but a constant, and agreeing about
    that proves nothing.
    """
    net = _build(name)
    side = side_of(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            low, high = float(parameter.min()), float(parameter.max())
            if low == high and abs(low) < 0.1 and parameter.numel() > 1:
                spread = 0.02 if parameter.dim() == 2 else 0.2
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    settle_batch_norms(net, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)))
    return net.eval()


def _build(name: str) -> nn.Module:
    models = import_torchvision_models()
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        import timm

        net: nn.Module = timm.create_model(short, **_image_size(short))
        return net
    keywords: dict[str, object] = {"weights_backbone": None} if short in SEGMENTATION else {}
    if short in ("googlenet", "inception_v3"):
        keywords["init_weights"] = False
    made: nn.Module = models.get_model(short, weights=None, **keywords)  # type: ignore[attr-defined]
    return made


def _image_size(short: str) -> dict[str, int]:
    """Position tables of a few hybrids are built for one image size."""
    return {"img_size": side_of(f"timm:{short}")} if short in ("visformer_tiny",) else {}
