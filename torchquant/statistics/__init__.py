from .gram import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_
from .histogram import exact_quantile, histogram_accumulate_, histogram_quantile, histogram_range, new_histogram

__all__ = [
    "conv_gram_accumulate_",
    "cross_gram_accumulate_",
    "exact_quantile",
    "gram_accumulate_",
    "histogram_accumulate_",
    "histogram_quantile",
    "histogram_range",
    "new_histogram",
]
