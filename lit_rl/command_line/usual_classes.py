"""The classes of the callbacks that every run has, by their names in `run.callbacks`: dotted paths, which are read without any import."""

USUAL_CLASSES = {
    "progress": ("callbacks.progress.Progress",),
    "learning_rate": ("callbacks.learning_rate.LearningRate",),
    "throughput": ("callbacks.throughput.Throughput",),
    "samples": ("callbacks.sample_texts.SampleTexts", "callbacks.sample_gallery.SampleGallery"),  # of texts; of images
    "newest": ("lightning.pytorch.callbacks.ModelCheckpoint",),
    "rng_state": ("callbacks.rng_state.RngState",),
    "heartbeat": ("callbacks.heartbeat.Heartbeat",),
    "graceful_stop": ("callbacks.graceful_stop.GracefulStop",),
}
