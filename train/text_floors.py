"""What a classifier of texts stands beside: TF-IDF with logistic regression, scikit-learn's own (text2tree.md 13)."""

import numpy as np

from train.data.coded_texts import CodedTexts
from train.text_metrics import one_hot

CHARACTERS = {"analyzer": "char_wb", "ngram_range": (3, 4), "sublinear_tf": True, "dtype": np.float32}


def tfidf(source: CodedTexts) -> dict[str, np.ndarray]:
    """Scores float32[n, K] of ``dev`` and ``test``.

    Several labels: words and pairs of words, one balanced logistic regression a label (C = 10). One label: the class of
    the nearest training text by character 3- and 4-grams, for a regression over thousands of classes of few texts each
    is both slow and worse. These are also read where no word is in two training texts, as in Chinese it may be.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    train = source.parts["train"]
    found = {}
    if not source.multi_label:
        words = TfidfVectorizer(**CHARACTERS)
        known = words.fit_transform(train.texts)
        for split in ("dev", "test"):
            asked = words.transform(source.parts[split].texts)
            nearest = np.concatenate([np.asarray((asked[i:i + 256] @ known.T).argmax(1)).ravel()
                                      for i in range(0, asked.shape[0], 256)])
            found[split] = one_hot(train.labels[nearest], source.tree.num_classes).astype(np.float32)
        return found
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    try:
        known = words.fit_transform(train.texts)
    except ValueError:  # an empty vocabulary
        words = TfidfVectorizer(**CHARACTERS)
        known = words.fit_transform(train.texts)
    model = OneVsRestClassifier(LogisticRegression(C=10, class_weight="balanced", max_iter=1000, solver="liblinear"))
    model.fit(known, train.labels)
    return {split: model.predict_proba(words.transform(source.parts[split].texts)).astype(np.float32)
            for split in ("dev", "test")}
