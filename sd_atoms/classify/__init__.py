"""Image classifiers: a pretrained network whose layers are adapted by any method, with a head for classes of one's own
(the paper's discriminative experiments, its section 4.2).
"""
