"""SeqSetVAE, the model.  It imports from the pipeline only the vocabulary of terms, the options and the batch."""
