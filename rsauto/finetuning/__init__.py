"""From a point of a study to a finished adapter: one full-length run with checkpoints.

request.py     what was asked for, and which trial that is; checked before anything is loaded
out_folder.py  the folder of one training: what is trained in it, how far it is, its results
run.py         the run itself, a generator of events
trackers.py    TensorBoard, W&B and trackio, fed from those events
"""
