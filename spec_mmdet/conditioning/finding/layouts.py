"""Layouts of known attention classes: which rows of their layers are queries, keys and values.

A template is a layout as :func:`.rows.parse_layout` reads it, with H heads of queries of d rows, G heads of keys and
values, S = H / G queries per key, and values of v rows. Attributes of the module can be named as well; N is the number
of rows of all layers over 3 dim.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .names import NamedLayer
from .rows import Layout, RowSelection, parse_layout

BY_ROLE = '{H}q{d} {G}k{d} {G}v{v}'
BY_GROUP = '{G}({S}q{d} k{d} v{v})'  # if G = H: head by head
GATED = '{H}(q{d} -{d}) {G}k{d} {G}v{v}'

# Templates of classes by module and name, below timm. and transformers.models. Separate layers need no entry.
_TIMM = {
    BY_ROLE: """
        layers.attention.Attention layers.attention_pool.AttentionPoolLatent layers.bottleneck_attn.BottleneckAttn
        models.beit.Attention models.cait.TalkingHeadAttn models.coat.FactorAttnConvRelPosEnc models.convit.GPSA
        models.davit.WindowAttention models.edgenext.CrossCovarianceAttn models.eva.EvaAttention
        models.fastvit.Attention models.hiera.MaskUnitAttention models.metaformer.Attention 
        models.nest.Attention models.pvt_v2.Attention models.shvit.SHSA models.swin_transformer.WindowAttention
        models.swin_transformer_v2.WindowAttention models.swin_transformer_v2_cr.WindowMultiHeadAttention
        models.tnt.Attention models.twins.GlobalSubSampleAttn models.twins.LocallyGroupedAttn
        models.vision_transformer.Attention models.vision_transformer_relpos.RelPosAttention models.visformer.Attention
        models.volo.Attention models.volo.ClassAttention models.xcit.XCA""",
    BY_GROUP: """
        layers.halo_attn.HaloAttn models.efficientformer.Attention models.levit.Attention
        models.levit.AttentionDownsample models.maxxvit.Attention2d models.maxxvit.AttentionCl
        models.tiny_vit.Attention""",
    '{H}v{d} {H}q{d} {H}k{d}': 'models.davit.ChannelAttention',  # it attends from V to Q
    '{N}(q{dim} k{dim} v{dim})': 'models.efficientvit_mit.LiteMLA',
    'q1 k{embed_dim} v{embed_dim}': 'models.mobilevit.LinearSelfAttention',
}
_TRANSFORMERS = {
    BY_ROLE: """
        gpt2.modeling_gpt2.GPT2Attention imagegpt.modeling_imagegpt.ImageGPTAttention
        mgp_str.modeling_mgp_str.MgpstrAttention modernbert.modeling_modernbert.ModernBertAttention
        mpt.modeling_mpt.MptAttention openai.modeling_openai.Attention phi3.modeling_phi3.Phi3Attention
        timesformer.modeling_timesformer.TimesformerSelfAttention""",
    BY_GROUP: """
        bloom.modeling_bloom.BloomAttention deberta.modeling_deberta.DisentangledSelfAttention
        falcon.modeling_falcon.FalconAttention gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention
        gpt_neox.modeling_gpt_neox.GPTNeoXAttention levit.modeling_levit.LevitAttention
        levit.modeling_levit.LevitAttentionSubsample minimax.modeling_minimax.MiniMaxLightningAttention
        persimmon.modeling_persimmon.PersimmonAttention""",
    GATED: 'qwen3_next.modeling_qwen3_next.Qwen3NextAttention',
    '4({H4}q{d} {H4}v{d} {H4}k{d})': 'codegen.modeling_codegen.CodeGenAttention',
    'q1 k{embed_dim} v{embed_dim}': 'mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention',
}
KNOWN = {
    'torch.nn.modules.activation.MultiheadAttention': BY_ROLE,
    'spec_mmdet.models.attention.XCA': BY_ROLE,
    **{f'timm.{name}': template for template, names in _TIMM.items() for name in names.split()},
    **{f'transformers.models.{name}': template for template, names in _TRANSFORMERS.items() for name in names.split()},
}

_HEADS = ['num_heads', 'num_attention_heads', 'heads', 'n_heads', 'n_head', 'nhead', 'num_query_heads']
_KEY_HEADS = ['num_key_value_heads', 'num_kv_heads', 'n_kv_heads', 'kv_heads']
_WIDTHS = ['dim_head_qk', 'key_dim', 'qk_dim', 'qk_head_dim', 'head_dim', 'attention_head_size', 'head_size']
_WIDTHS += ['dim_head', 'dim_per_head', 'd_head']


def find_template(attention: nn.Module) -> str | None:
    """Look up the template of a module's class, or of the base class whose forward it inherits."""
    kind = next(c for c in type(attention).__mro__ if 'forward' in vars(c))
    template = KNOWN.get(f'{kind.__module__}.{kind.__qualname__}')
    # head_first is an option of MaxViT's attention.
    return BY_ROLE if template and getattr(attention, 'head_first', True) is False else template


def _find_count(attention: nn.Module, names: list[str]) -> int | None:
    """The number that the module, or else its configuration, has under one of these names."""
    for holder in (attention, getattr(attention, 'config', None)):
        for name in names:
            if type(value := getattr(holder, name, None)) is int and value > 0:
                return value
    return None


def count_heads(attention: nn.Module) -> int | None:
    """Number of query heads that the module states."""
    return _find_count(attention, _HEADS)


def fit_template(template: str, attention: nn.Module, layers: list[NamedLayer]) -> Iterator[tuple[Layout, ...]]:
    """Yield the layouts of a template that fill the rows of all layers, the most likely numbers of heads first."""
    attributes = {name: value for name, value in vars(attention).items() if type(value) is int}
    for sizes in _guess_sizes(attention, layers):
        try:
            blocks = parse_layout(template.format(**{**attributes, **sizes}))
        except KeyError:  # the module lacks an attribute
            return
        layouts = tuple(
            tuple((role, n) for role, n in blocks if role in layer.roles or (role == '-' and 'Q' in layer.roles))
            for layer in layers
        )
        if all(sum(n for _, n in layout) == layer.shape[0] for layout, layer in zip(layouts, layers)):
            yield layouts


def _guess_sizes(attention: nn.Module, layers: list[NamedLayer]) -> Iterator[dict[str, int]]:
    total = sum(layer.shape[0] for layer in layers)
    N = total // (3 * (_find_count(attention, ['dim']) or total))
    H, G = count_heads(attention), _find_count(attention, _KEY_HEADS)
    widths = [_find_count(attention, [name]) for name in _WIDTHS]
    h = H or 1
    for d in filter(None, [*widths, total // (h + 2 * (G or h))]):
        for g in dict.fromkeys([G or h, h, 1]):
            for v in dict.fromkeys([d, (total - (h + g) * d) // g]):
                if h % g == 0 and v > 0:
                    yield dict(H=h, G=g, S=h // g, H4=h // 4, N=N, d=d, v=v)


def fit_separate_layers(attention: nn.Module, group: list[NamedLayer]) -> list[list[RowSelection]] | None:
    """Take layers of one projection each as a whole if their rows are those of the heads that the module states."""
    if len(group) < 3:
        return None
    Q, K, V = (layer.shape[0] for layer in group)
    H, G = count_heads(attention), _find_count(attention, _KEY_HEADS)
    widths = [_find_count(attention, [name]) for name in _WIDTHS] + [Q // H if H else None]
    for d in filter(None, widths):
        h, g = Q // d, K // d
        fits = h * d == Q and g * d == K and H in (None, h) and (G in (None, g) or Q == K)
        if fits and g and h % g == 0 and V % g == 0:
            return [[RowSelection(x.roles, n, None, x.transposed)] for x, n in zip(group, (h, g, g))]
    return [[RowSelection(x.roles, None, None, x.transposed)] for x in group] if Q == K else None
