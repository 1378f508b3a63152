"""Titles and authors, copied from arXiv, of the papers behind mergers, routings and calibrations, for BibTeX."""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv: its title, and its authors separated by commas."""

    title: str
    authors: str


PAPERS = {
    "1602.05629": Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        "H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas",
    ),
    "1812.07108": Paper(
        "Learning Private Neural Language Modeling with Attentive Aggregation",
        "Shaoxiong Ji, Shirui Pan, Guodong Long, Xue Li, Jing Jiang, Zi Huang",
    ),
    "2006.10726": Paper(
        "Tent: Fully Test-time Adaptation by Entropy Minimization",
        "Dequan Wang, Evan Shelhamer, Shaoteng Liu, Bruno Olshausen, Trevor Darrell",
    ),
    "2007.07481": Paper(
        "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
        "Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi, H. Vincent Poor",
    ),
    "2109.01903": Paper(
        "Robust fine-tuning of zero-shot models",
        "Mitchell Wortsman, Gabriel Ilharco, Jong Wook Kim, Mike Li, Simon Kornblith, Rebecca Roelofs, "
        "Raphael Gontijo-Lopes, Hannaneh Hajishirzi, Ali Farhadi, Hongseok Namkoong, Ludwig Schmidt",
    ),
    "2111.09832": Paper("Merging Models with Fisher-Weighted Averaging", "Michael Matena, Colin Raffel"),
    "2203.05482": Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
        "inference time",
        "Mitchell Wortsman, Gabriel Ilharco, Samir Yitzhak Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, "
        "Ari S. Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith, Ludwig Schmidt",
    ),
    "2205.13104": Paper(
        "Trainable Weight Averaging: Accelerating Training and Improving Generalization",
        "Tao Li, Zhehao Huang, Qinghua Tao, Yingwen Wu, Xiaolin Huang",
    ),
    "2208.03306": Paper(
        "Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models",
        "Margaret Li, Suchin Gururangan, Tim Dettmers, Mike Lewis, Tim Althoff, Noah A. Smith, Luke Zettlemoyer",
    ),
    "2208.05592": Paper(
        "Patching open-vocabulary models by interpolating weights",
        "Gabriel Ilharco, Mitchell Wortsman, Samir Yitzhak Gadre, Shuran Song, Hannaneh Hajishirzi, Simon Kornblith, "
        "Ali Farhadi, Ludwig Schmidt",
    ),
    "2211.08403": Paper(
        "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
        "Keller Jordan, Hanie Sedghi, Olga Saukh, Rahim Entezari, Behnam Neyshabur",
    ),
    "2212.04089": Paper(
        "Editing Models with Task Arithmetic",
        "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, "
        "Hannaneh Hajishirzi, Ali Farhadi",
    ),
    "2212.09849": Paper(
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
    ),
    "2303.05118": Paper(
        "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
        "Gengwei Zhang, Liyuan Wang, Guoliang Kang, Ling Chen, Yunchao Wei",
    ),
    "2306.01708": Paper(
        "TIES-Merging: Resolving Interference When Merging Models",
        "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
    ),
    "2307.13269": Paper(
        "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        "Chengsong Huang, Qian Liu, Bill Yuchen Lin, Tianyu Pang, Chao Du, Min Lin",
    ),
    "2308.08090": Paper(
        "Separate the Wheat from the Chaff: Model Deficiency Unlearning via Parameter-Efficient Module Operation",
        "Xinshuo Hu, Dongfang Li, Baotian Hu, Zihao Zheng, Zhenyu Liu, Min Zhang",
    ),
    "2310.02575": Paper(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "Enneng Yang, Zhenyi Wang, Li Shen, Shiwei Liu, Guibing Guo, Xingwei Wang, Dacheng Tao",
    ),
    "2310.12808": Paper(
        "Model Merging by Uncertainty-Based Gradient Matching",
        "Nico Daheim, Thomas Möllenhoff, Edoardo Maria Ponti, Iryna Gurevych, Mohammad Emtiyaz Khan",
    ),
    "2311.02428": Paper(
        "Task Arithmetic with LoRA for Continual Learning",
        "Rajas Chitale, Ankit Vaidya, Aditya Kane, Archana Ghotkar",
    ),
    "2311.03099": Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
    ),
    "2311.13600": Paper(
        "ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs",
        "Viraj Shah, Nataniel Ruiz, Forrester Cole, Erika Lu, Svetlana Lazebnik, Yuanzhen Li, Varun Jampani",
    ),
    "2312.04339": Paper(
        "Merging by Matching Models in Task Parameter Subspaces", "Derek Tam, Mohit Bansal, Colin Raffel"
    ),
    "2312.06173": Paper(
        "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion",
        "Anke Tang, Li Shen, Yong Luo, Liang Ding, Han Hu, Bo Du, Dacheng Tao",
    ),
    "2312.06795": Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "MohammadReza Davari, Eugene Belilovsky",
    ),
    "2312.08977": Paper(
        "Weighted Ensemble Models Are Strong Continual Learners",
        "Imad Eddine Marouf, Subhankar Roy, Enzo Tartaglione, Stéphane Lathuilière",
    ),
    "2402.00433": Paper(
        "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts",
        "Anke Tang, Li Shen, Yong Luo, Nan Yin, Lefei Zhang, Dacheng Tao",
    ),
    "2402.02705": Paper(
        "Representation Surgery for Multi-Task Model Merging",
        "Enneng Yang, Li Shen, Zhenyi Wang, Guibing Guo, Xiaojun Chen, Xingwei Wang, Dacheng Tao",
    ),
    "2402.09997": Paper(
        "LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild",
        "Ziyu Zhao, Leilei Gan, Guoyin Wang, Wangchunshu Zhou, Hongxia Yang, Kun Kuang, Fei Wu",
    ),
    "2403.08755": Paper(
        "DAM: Dynamic Adapter Merging for Continual Video QA Learning",
        "Feng Cheng, Ziyang Wang, Yi-Lin Sung, Yan-Bo Lin, Mohit Bansal, Gedas Bertasius",
    ),
    "2403.08994": Paper(
        "Ethos: Rectifying Language Models in Orthogonal Parameter Space",
        "Lei Gao, Yue Niu, Tingting Tang, Salman Avestimehr, Murali Annavaram",
    ),
    "2403.09891": Paper("Fisher Mask Nodes for Language Model Merging", "Thennal D K, Ganesh Nathan, Suchithra M S"),
    "2403.13257": Paper(
        "Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        "Charles Goddard, Shamane Siriwardhana, Malikeh Ehghaghi, Luke Meyers, Vlad Karpukhin, Brian Benedict, "
        "Mark McQuade, Jacob Solawetz",
    ),
    "2403.19522": Paper(
        "Model Stock: All we need is just a few fine-tuned models", "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han"
    ),
    "2405.07813": Paper(
        "Localizing Task Information for Improved Model Merging and Compression",
        "Ke Wang, Nikolaos Dimitriadis, Guillermo Ortiz-Jiménez, François Fleuret, Pascal Frossard",
    ),
    "2405.17461": Paper(
        "EMR-Merging: Tuning-Free High-Performance Model Merging",
        "Chenyu Huang, Peng Ye, Tao Chen, Tong He, Xiangyu Yue, Wanli Ouyang",
    ),
    "2406.11385": Paper(
        "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
        "Yuyan Zhou, Liang Song, Bingning Wang, Weipeng Chen",
    ),
    "2406.11617": Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
    ),
    "2406.10952": Paper(
        "Avoiding Copyright Infringement via Large Language Model Unlearning",
        "Guangyao Dou, Zheyuan Liu, Qing Lyu, Kaize Ding, Eric Wong",
    ),
    "2406.09770": Paper(
        "Towards Efficient Pareto Set Approximation via Mixture of Experts Based Model Fusion",
        "Anke Tang, Li Shen, Yong Luo, Shiwei Liu, Han Hu, Bo Du",
    ),
    "2406.15479": Paper(
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
        "Zhenyi Lu, Chenghao Fan, Wei Wei, Xiaoye Qu, Dangyang Chen, Yu Cheng",
    ),
    "2407.02880": Paper(
        "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
        "Frederic Z. Zhang, Paul Albert, Cristian Rodriguez-Opazo, Anton van den Hengel, Ehsan Abbasnejad",
    ),
    "2407.03641": Paper(
        "Learning Scalable Model Soup on a Single GPU: An Efficient Subspace Training Strategy",
        "Tao Li, Weisen Jiang, Fanghui Liu, Xiaolin Huang, James T. Kwok",
    ),
    "2407.06322": Paper(
        "MagMax: Leveraging Model Merging for Seamless Continual Learning",
        "Daniel Marczak, Bartłomiej Twardowski, Tomasz Trzciński, Sebastian Cygert",
    ),
    "2408.10174": Paper(
        "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation Models",
        "Anke Tang, Li Shen, Yong Luo, Shuai Xie, Han Hu, Lefei Zhang, Bo Du, Dacheng Tao",
    ),
    "2410.02396": Paper(
        "Parameter Competition Balancing for Model Merging",
        "Guodong Du, Junlin Lee, Jing Li, Runhua Jiang, Yifei Guo, Shuyang Yu, Hanting Liu, Sim Kuan Goh, "
        "Ho-Kin Tang, Daojing He, Min Zhang",
    ),
    "2410.14389": Paper(
        "SurgeryV2: Bridging the Gap Between Model Merging and Multi-Task Learning with Deep Representation Surgery",
        "Enneng Yang, Li Shen, Zhenyi Wang, Guibing Guo, Xingwei Wang, Xiaocun Cao, Jie Zhang, Dacheng Tao",
    ),
    "2410.19735": Paper(
        "Model merging with SVD to tie the Knots",
        "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
    ),
    "2311.13534": Paper(
        "LM-Cocktail: Resilient Tuning of Language Models via Model Merging",
        "Shitao Xiao, Zheng Liu, Peitian Zhang, Xingrun Xing",
    ),
    "2402.18913": Paper(
        "AdaMergeX: Cross-Lingual Transfer with Large Language Models via Adaptive Adapter Merging",
        "Yiran Zhao, Wenxuan Zhang, Huiming Wang, Kenji Kawaguchi, Lidong Bing",
    ),
    "2408.03092": Paper(
        "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement",
        "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
    ),
    "2410.17961": Paper(
        "Closed-form merging of parameter-efficient modules for Federated Continual Learning",
        "Riccardo Salami, Pietro Buzzega, Matteo Mosconi, Jacopo Bonato, Luigi Sabetta, Simone Calderara",
    ),
    "2412.00081": Paper(
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, Fabrizio Silvestri, "
        "Emanuele Rodolà",
    ),
    "2412.13526": Paper(
        "Rethink the Evaluation Protocol of Model Merging on Classification Task",
        "Fanshuang Kong, Richong Zhang, Zhijie Nie, Ziqiao Wang",
    ),
    "2501.09522": Paper(
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
        "Anke Tang, Enneng Yang, Li Shen, Yong Luo, Han Hu, Bo Du, Dacheng Tao",
    ),
    "2502.04959": Paper(
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, "
        "Joost van de Weijer",
    ),
    "2503.22178": Paper(
        "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging",
        "Chanhyuk Lee, Jiho Choi, Chanryeol Lee, Donggyun Kim, Seunghoon Hong",
    ),
    "2503.08099": Paper(
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "Runxi Cheng, Feng Xiong, Yongxian Wei, Wanyun Zhu, Chun Yuan",
    ),
    "2504.02666": Paper(
        "BECAME: BayEsian Continual Learning with Adaptive Model MErging",
        "Mei Li, Yuxiang Lu, Qinyan Dai, Suizhi Huang, Yue Ding, Hongtao Lu",
    ),
    "2505.11883": Paper(
        "MINGLE: Mixture of Null-Space Gated Low-Rank Experts for Test-Time Continual Model Merging",
        "Zihuan Qiu, Yi Xu, Chiyuan He, Fanman Meng, Linfeng Xu, Qingbo Wu, Hongliang Li",
    ),
    "2509.21413": Paper(
        "Null-Space Filtering for Data-Free Continual Model Merging: Preserving Stability, Promoting Plasticity",
        "Zihuan Qiu, Lei Wang, Yang Cao, Runtong Zhang, Bing Su, Yi Xu, Fanman Meng, Linfeng Xu, "
        "Qingbo Wu, Hongliang Li",
    ),
    "2602.05536": Paper(
        "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
        "Yayuan Li, Ze Peng, Jian Zhang, Jintao Guo, Yue Duan, Yinghuan Shi",
    ),
    "2603.06242": Paper(
        "DC-Merge: Improving Model Merging with Directional Consistency",
        "Han-Chen Zhang, Zi-Hao Zhou, Mao-Lin Luo, Shimin Di, Min-Ling Zhang, Tong Wei",
    ),
    "2603.09888": Paper(
        "LCA: Local Classifier Alignment for Continual Learning",
        "Tung Tran, Danilo Vasconcellos Vargas, Khoat Than",
    ),
    "2604.01329": Paper(
        "Model Merging via Data-Free Covariance Estimation",
        "Marawan Gamal Abdel Hameed, Derek Tam, Pascal Jr Tikeng Notsawo, Colin Raffel, Guillaume Rabusseau",
    ),
    "2605.20803": Paper(
        "Tunable MAGMAX: Preference-Aware Model Merging for Continual Learning",
        "Kei Hiroshima, Kento Uchida, Shinichi Shirakawa",
    ),
}


def bibtex(sources: Iterable[str]) -> str:
    """Return BibTeX entries for arXiv ids, each once, in order.

    Args:
        sources: The ids. An id that ``PAPERS`` lacks gets an entry without title and authors.

    Example:
        >>> print(bibtex(["2111.09832"]))
        @misc{matena2021merging,
          title = {{Merging Models with Fisher-Weighted Averaging}},
          author = {Michael Matena and Colin Raffel},
          year = {2021},
          eprint = {2111.09832},
          archivePrefix = {arXiv},
          url = {https://arxiv.org/abs/2111.09832},
        }
    """
    return "\n\n".join(_entry(source) for source in dict.fromkeys(sources))


def _entry(source: str) -> str:
    paper = PAPERS.get(source)
    fields = {"title": f"{{{paper.title}}}", "author": paper.authors.replace(", ", " and ")} if paper else {}
    fields |= {"year": f"20{source[:2]}", "eprint": source, "archivePrefix": "arXiv"}
    fields["url"] = f"https://arxiv.org/abs/{source}"
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{_key(source, paper)},", *lines, "}"])


def _key(source: str, paper: Paper | None) -> str:
    if paper is None:
        return f"arxiv{source}"
    family = paper.authors.split(", ")[0].split()[-1]
    word = next(word for word in paper.title.replace("-", " ").replace(":", "").split() if len(word) > 3)
    plain = unicodedata.normalize("NFKD", f"{family}20{source[:2]}{word}").encode("ascii", "ignore").decode()
    return "".join(filter(str.isalnum, plain)).lower()
