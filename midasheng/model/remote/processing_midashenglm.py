"""Processor of MiDashengLM: prompts and clips -> input_ids, attention_mask, input_values (B, L), audio_length (B,).

Text is padded on the left, audio on the right with zeros; a clip shorter than 0.2 s gets silence up to 0.2 s.
"""

import numpy as np
from transformers import BatchFeature
from transformers.audio_utils import load_audio
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .configuration_midashenglm import MIN_SAMPLES, SAMPLE_RATE, audio_tokens


class MiDashengLMProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults of a call."""

    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left"},
        "audio_kwargs": {"sampling_rate": SAMPLE_RATE},
        "common_kwargs": {"return_tensors": "pt"},
    }


class MiDashengLMProcessor(ProcessorMixin):
    """A feature extractor (16 kHz, no normalisation) and a tokenizer."""

    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4
        attributes = ["feature_extractor", "tokenizer"]
        feature_extractor_class = "AutoFeatureExtractor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self, feature_extractor=None, tokenizer=None, chat_template=None, audio_token="<|AUDIO|>",
        audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
    ):  # fmt: skip
        self.audio_token = audio_token
        self.audio_bos_token = audio_bos_token
        self.audio_eos_token = audio_eos_token
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)

    @property
    def model_input_names(self):
        """What the model takes."""
        return ["input_ids", "attention_mask", "input_values", "audio_length"]

    def __call__(self, text=None, audio=None, **kwargs):
        """`text`: a prompt or a list of them, one `<|audio_bos|><|AUDIO|><|audio_eos|>` for each clip, as the chat
        template writes it. `audio`: the clips of all prompts in their order; float arrays of one channel at 16 kHz, or
        files. Raises ValueError for clips that are not what is announced."""
        merged = self._merge_kwargs(
            MiDashengLMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        if merged["text_kwargs"].get("truncation"):
            raise ValueError("truncation would cut off audio; shorten the prompt or the clip instead")
        texts = [text] if isinstance(text, str) else list(text)
        clips = [self._clip(clip, number) for number, clip in enumerate(_flat(audio))]
        announced = sum(t.count(self.audio_token) for t in texts)
        if announced != len(clips):
            raise ValueError(f"the text holds {announced} {self.audio_token}, but there are {len(clips)} clips")
        counts = iter([audio_tokens(len(clip)) for clip in clips])
        expanded = []
        for one in texts:
            head, *tails = one.split(self.audio_token)
            expanded.append(head + "".join(self.audio_token * next(counts) + tail for tail in tails))
        encoded = self.tokenizer(expanded, **merged["text_kwargs"])
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if clips:
            padded = self.feature_extractor(
                clips, sampling_rate=merged["audio_kwargs"]["sampling_rate"], padding=True, return_attention_mask=False
            )
            inputs["input_values"] = np.asarray(padded["input_values"], dtype=np.float32)
            inputs["audio_length"] = np.array([len(clip) for clip in clips], dtype=np.int64)
        return BatchFeature(inputs, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def _clip(self, clip, number):
        if isinstance(clip, str):
            clip = load_audio(clip, sampling_rate=SAMPLE_RATE)
        clip = np.asarray(clip)
        if clip.ndim == 2 and clip.shape[0] == 1:
            clip = clip[0]
        if clip.ndim != 1 or not clip.size:
            raise ValueError(f"clip {number}: shape {clip.shape}; give one channel of samples")
        if not np.issubdtype(clip.dtype, np.floating):
            raise ValueError(f"clip {number}: {clip.dtype}; give floats between -1 and 1 (int16 / 32768)")
        if not np.isfinite(clip).all():
            raise ValueError(f"clip {number} holds infinities or NaN")
        return np.pad(clip.astype(np.float32), (0, max(0, MIN_SAMPLES - len(clip))))


def _flat(audio):
    """One clip, a list of clips, or a list of such lists -> a list of clips; a list of numbers is a clip."""
    if audio is None:
        return []
    if not isinstance(audio, (list, tuple)) or (audio and isinstance(audio[0], (int, float))):
        return [audio]
    return [clip for item in audio for clip in _flat(item)]
