"""The demo's questions and answers in several languages: scripts without spaces, endings, compounds, prefixes."""

from dataclasses import dataclass

CONDITIONS = ("melanoma", "psoriasis", "vitiligo", "urticaria")


@dataclass(frozen=True)
class Language:
    """Texts of one language.

    Attributes:
        names: name of each of `CONDITIONS`.
        questions: question -> answer, with {name} or, in an inflected form, {form}.
        tone_question: what skin is shown.
        tone_answers: for light and for dark skin.
        forms: inflected form of each of `CONDITIONS`; the names where there is none.
    """

    names: tuple[str, ...]
    questions: dict[str, str]
    tone_question: str
    tone_answers: tuple[str, str]
    forms: tuple[str, ...] = ()

    def name(self, condition: str) -> str:
        return self.names[CONDITIONS.index(condition)]

    def answer(self, question: str, condition: str) -> str:
        number = CONDITIONS.index(condition)
        return self.questions[question].format(name=self.names[number], form=(self.forms or self.names)[number])


LANGUAGES = {
    "en": Language(
        names=CONDITIONS,
        questions={
            "What condition is shown?": "This is {name}.",
            "Which diagnosis fits this image?": "The diagnosis is {name}.",
            "Name the skin condition.": "It is {name}.",
        },
        tone_question="Is the skin light or dark?",
        tone_answers=("The skin is light.", "The skin is dark."),
    ),
    "zh": Language(
        names=("黑色素瘤", "银屑病", "白癜风", "荨麻疹"),
        questions={
            "图中是什么皮肤病？": "这是{name}。",
            "哪个诊断符合这张图片？": "诊断为{name}。",
            "请说出这种皮肤病的名称。": "图中为{name}的表现。",
        },
        tone_question="皮肤是浅色还是深色？",
        tone_answers=("皮肤是浅色。", "皮肤是深色。"),
    ),
    "tr": Language(
        names=("melanom", "sedef", "vitiligo", "ürtiker"),
        forms=("melanomdur", "sedeftir", "vitiligodur", "ürtikerdir"),
        questions={
            "Görüntüde hangi hastalık var?": "Bu bir {form}.",
            "Bu görüntüye hangi tanı uyar?": "Tanı {form}.",
            "Cilt hastalığının adını söyle.": "Görülen hastalık {form}.",
        },
        tone_question="Cilt açık mı, koyu mu?",
        tone_answers=("Cilt açık.", "Cilt koyu."),
    ),
    "de": Language(
        names=("Melanom", "Psoriasis", "Vitiligo", "Urtikaria"),
        questions={
            "Welche Krankheit ist zu sehen?": "Das ist {name}.",
            "Welche Diagnose passt zu diesem Bild?": "Es besteht {name}verdacht.",
            "Nenne die Hautkrankheit.": "Es ist ein {name}herd.",
        },
        tone_question="Ist die Haut hell oder dunkel?",
        tone_answers=("Die Haut ist hell.", "Die Haut ist dunkel."),
    ),
    "ar": Language(
        names=("ميلانوما", "صدفية", "بهاق", "شرى"),
        questions={
            "ما المرض الظاهر في الصورة؟": "هذا هو ال{name}.",
            "أي تشخيص يناسب هذه الصورة؟": "التشخيص هو {name}.",
            "اذكر اسم المرض الجلدي.": "المريض مصاب بال{name}.",
        },
        tone_question="هل البشرة فاتحة أم داكنة؟",
        tone_answers=("البشرة فاتحة.", "البشرة داكنة."),
    ),
}
