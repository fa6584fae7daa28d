"""Configuration of MiDashengLM: a Dasheng audio encoder, a projector, a text decoder; and how many tokens a clip is."""

from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig

SAMPLE_RATE = 16_000
MIN_SAMPLES = 3_200  # 0.2 s: a shorter clip is padded with silence to this length, as vLLM does


def audio_tokens(n_samples):
    """Audio tokens (5 a second) of a clip of `n_samples` samples at 16 kHz; an int or a tensor of them."""
    mel_frames = 1 + n_samples // 160
    return mel_frames // 4 // 5


class DashengConfig(PretrainedConfig):
    """The audio encoder."""

    model_type = "midashenglm_dasheng_encoder"

    def __init__(self, embed_dim=1280, depth=32, num_heads=16, mlp_ratio=4.0, target_length=1008, **kwargs):
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.target_length = target_length  # mel frames that see each other
        super().__init__(**kwargs)


class MiDashengLMConfig(PretrainedConfig):
    """The whole model. `text_config` may be that of any causal text model of transformers."""

    model_type = "midashenglm"
    sub_configs = {"audio_encoder_config": DashengConfig, "text_config": AutoConfig}

    def __init__(
        self, audio_encoder_config=None, text_config=None, subsample_factor=5, audio_token_id=151646, **kwargs
    ):
        if not isinstance(audio_encoder_config, PretrainedConfig):
            audio_encoder_config = DashengConfig(**(audio_encoder_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            fields = dict(text_config or {})
            architecture = fields.pop("model_type", "qwen2_5_omni_text")
            if architecture == "qwen2_5_omni_text":  # transformers 4 has no AutoConfig entry for it
                text_config = Qwen2_5OmniTextConfig(**fields)
            else:
                text_config = AutoConfig.for_model(architecture, **fields)
        self.audio_encoder_config = audio_encoder_config
        self.text_config = text_config
        self.subsample_factor = subsample_factor
        self.audio_token_id = audio_token_id
        # whether head and embedding are one is text_config's to say; the model reads it there
        super().__init__(**(kwargs | {"tie_word_embeddings": False}))
