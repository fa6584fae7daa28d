"""Run folder -> numbers: questions, answers, scores. Below `train`, which scores its validation answers with it."""
