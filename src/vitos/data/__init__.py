"""Records and pictures: from files to `Record`s and upright RGB images, and all checks on the way.

| what | module |
| --- | --- |
| record files → records, validated field by field | `readers`; names and half characters in `names` |
| everything that is wrong with data sets; leaks between splits | `check`, `leaks`, `looks` |
| image files → RGB, for training, evaluation and `ask` alike | `images`; frame, slice, window, crop in `picture` |
| Pillow's formats | `modes`, `tiff` |
| DICOM | `dicom`, then `dicom_header` (numbers, tables) and `dicom_pixels` (the grayscale pipeline) |
| NIfTI; values → 8 bit for all formats | `nifti`; `gray` |
| parquet and hub ↔ JSON; zip archives of releases | `convert`; `archive` |
| COCO, YOLO, masks, VinDr's CSV, Visual-CoT ↔ records | `boxed/`, a file each |
| synthetic slices with boxed questions | `phantom`, `phantom_files` |
| files that appear whole or not at all | `files` |
"""
