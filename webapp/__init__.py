"""The page of `app.py`: photos, questions, answers of an adapter and its base model, likely labels, occlusion maps."""
