"""SeqSetVAE, the model; it knows of the pipeline only the batch and the words."""
