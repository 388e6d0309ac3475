from .gram import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_

__all__ = ["conv_gram_accumulate_", "cross_gram_accumulate_", "gram_accumulate_"]
