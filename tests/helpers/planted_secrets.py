"""What must not get out: planted in the tests, looked for in every artefact."""

TOKEN, FOLDER, PATIENT = "hf_plantedtokenplantedtoken", "ward7_secret", "mueller_hans"
PERSON, PLACE, COMMENT, USER = "Hans Mueller, born 1961", "Planted Street 5", "seen by Dr. Planted", "user_planted"
SECRETS = (TOKEN, FOLDER, PATIENT, PERSON, PLACE, COMMENT, USER)
