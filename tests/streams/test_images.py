import pickle

import numpy as np
from torchvision import transforms

from clmerge.streams.images import ImageDataset
from clmerge.streams.plan import SplitPlan
from clmerge.streams.sources import ArrayImages


def dataset(transform=None):
    images = np.arange(4, dtype=np.uint8).repeat(4).reshape(4, 2, 2)
    return ImageDataset(SplitPlan(ArrayImages(images, [0, 1, 0, 1]), (3, 0), (21, 20)), transform)


def test_positions_and_global_class_ids():
    data = dataset()
    assert len(data) == 2
    assert data.targets == [21, 20]
    image, target = data[0]
    assert (image.getpixel((0, 0)), target) == ((3, 3, 3), 21)


def test_a_worker_process_gets_the_same():
    data = pickle.loads(pickle.dumps(dataset(transforms.ToTensor())))
    image, target = data[1]
    assert image.shape == (3, 2, 2)
    assert (float(image.max()), target) == (0.0, 20)
