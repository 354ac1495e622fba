"""Amharic abbreviations in full: the table, and how prefixes, endings and full stops go with them.

The pairs are public facts, collected from the abbreviation lists of geezorg/data (amharic/abbreviations), the list of
the MIT-licensed package amharic-text-processor and common usage, and written anew here: both lists hold slips
(ለዶ/ር as ለዶክርተር, ጠ/ሚ/ር as a ministry) and each inflected form as a row of its own, where here one row and two rules
(PREFIXES in front, an ending behind) do. A slash and a full stop are one: ዓ/ም is ዓ.ም.
"""

from __future__ import annotations

import functools
import re

from tools._amharic_numbers import ENDING, ETHIOPIC, SCALE_WORDS, STOP, Notes, attach

PREFIXES = ("", "የ", "በ", "ለ", "ከ", "እነ", "የእነ", "ለእነ", "ከእነ", "በእነ", "ለነ", "ከነ", "የነ", "በነ", "በየ", "ለየ", "ከየ", "እንደ",
            "ስለ", "ወደ", "ያለ", "እስከ", "ባለ")
NOUN_ENDING = re.compile("(?:ዎች|ዎቹ|ዎችን|ች|ቹ|ው|ዋ|ነት|ነቱ|ነቷ|ነታቸው|ኤ|ዬ)?(?:ንና|ንም|ምና|ን|ና|ም|ስ)?")

WHOLE = {
    # eras and years
    "ዓ/ም": "ዓመተ ምሕረት", "አ/ም": "ዓመተ ምሕረት", "ዓ/ዓ": "ዓመተ ዓለም", "ዓ/ሂ": "ዓመተ ሂጅራ", "ቅ/ል/ክ": "ቅድመ ልደተ ክርስቶስ",
    "ድ/ል/ክ": "ድኅረ ልደተ ክርስቶስ", "ቅ/ክ": "ቅድመ ክርስቶስ", "ድ/ክ": "ድኅረ ክርስቶስ", "ዓ/ዘ": "ዓመተ ዘመን", "ክ/ዘ": "ክፍለ ዘመን",
    "ክ/ል/በ": "ክርስቶስ ልደት በፊት", "ቅ/ል/ክርስቶስ": "ቅድመ ልደተ ክርስቶስ",
    # ኤ stands for ኤውሮጳ; newsreaders say አውሮፓውያን
    "እ/ኤ/አ": "እንደ አውሮፓውያን አቆጣጠር", "እ/አ/አ": "እንደ አውሮፓውያን አቆጣጠር", "እ/ኢ/አ": "እንደ ኢትዮጵያ አቆጣጠር",
    "እ/ጎ/አ": "እንደ ጎርጎርዮሳውያን አቆጣጠር", "ወ/ዘ/ተ": "ወዘተ",
    # people
    "ዶ/ር": "ዶክተር", "ፕ/ር": "ፕሮፌሰር", "ኢ/ር": "ኢንጂነር", "መ/ር": "መምህር", "መ/ርት": "መምህርት", "ወ/ሮ": "ወይዘሮ",
    "ወ/ሪት": "ወይዘሪት", "ወ/ሮ/ሪት": "ወይዘሮ ወይዘሪት", "ወ/ሮ/ት": "ወይዘሮ ወይዘሪት",
    "ወ/ት": "ወይዘሪት", "ጠ/ሚ": "ጠቅላይ ሚኒስትር", "ጠ/ሚ/ር": "ጠቅላይ ሚኒስትር", "ጠ/ሚር": "ጠቅላይ ሚኒስትር",
    "ሚ/ር": "ሚኒስቴር", "ሚ/ሩ": "ሚኒስትሩ", "ሚ/ሯ": "ሚኒስትሯ", "ሚ/ሮች": "ሚኒስትሮች", "ሚ/ዴኤታ": "ሚኒስትር ዴኤታ", "ም/ሚ/ር": "ምክትል ሚኒስትር",
    "ፕ/ት": "ፕሬዚዳንት",
    "ፕ/ንት": "ፕሬዚዳንት", "ኮ/ል": "ኮሎኔል", "ኮ/ር": "ኮማንደር", "ጄ/ል": "ጄኔራል", "ጀ/ል": "ጄኔራል", "ሜ/ጄ": "ሜጀር ጄኔራል",
    "ሜ/ጄ/ል": "ሜጀር ጄኔራል", "ብ/ጄ": "ብርጋዴር ጄኔራል", "ብ/ጄ/ል": "ብርጋዴር ጄኔራል", "ሌ/ጄ": "ሌተና ጄኔራል",
    "ሌ/ጄ/ል": "ሌተና ጄኔራል", "ብ/ጄኔራል": "ብርጋዴር ጄኔራል", "ሜ/ጄኔራል": "ሜጀር ጄኔራል", "ሌ/ጄኔራል": "ሌተና ጄኔራል",
    "ሌ/ኮሎኔል": "ሌተና ኮሎኔል",
    "ሌ/ኮ": "ሌተና ኮሎኔል", "ሌ/ኮ/ል": "ሌተና ኮሎኔል", "ሻ/ል": "ሻምበል", "ሻ/ቃ": "ሻለቃ", "መ/አ": "መቶ አለቃ",
    "መ/አለቃ": "መቶ አለቃ", "ሃ/አለቃ": "ሃምሳ አለቃ", "አ/አለቃ": "አሥር አለቃ", "ሊ/መንበር": "ሊቀ መንበር", "አፈ/ጉባኤ": "አፈ ጉባኤ",
    "ቀ/ኃ/ሥ": "ቀዳማዊ ኃይለ ሥላሴ", "ፊ/ማርሻል": "ፊልድ ማርሻል", "አር/ት": "አርቲስት", "ጋ/ጠኛ": "ጋዜጠኛ", "ሲ/ር": "ሲስተር",
    "ዲ/ን": "ዲያቆን", "ቀ/ች": "ቀኛዝማች", "ግ/ች": "ግራዝማች", "ወ/ር": "ወታደር", "አ/ቶ": "አቶ", "ኮ/ነር": "ኮሚሽነር",
    # houses and offices
    "ት/ቤት": "ትምህርት ቤት", "ፍ/ቤት": "ፍርድ ቤት", "ም/ቤት": "ምክር ቤት", "መ/ቤት": "መሥሪያ ቤት", "ጽ/ቤት": "ጽሕፈት ቤት",
    "ፅ/ቤት": "ጽሕፈት ቤት", "ማ/ቤት": "ማረሚያ ቤት", "ን/ም/ቤት": "ንግድ ምክር ቤት", "ከ/ፍ/ቤት": "ከፍተኛ ፍርድ ቤት",
    "ቅ/ጽ/ቤት": "ቅርንጫፍ ጽሕፈት ቤት", "ት/ክፍል": "ትምህርት ክፍል", "ት/ሚኒስቴር": "ትምህርት ሚኒስቴር", "ት/ሚ": "ትምህርት ሚኒስቴር",
    "ት/ት": "ትምህርት", "ት/ርት": "ትምህርት", "ት/ቢሮ": "ትምህርት ቢሮ", "ጤ/ጣቢያ": "ጤና ጣቢያ", "ጤ/ኬላ": "ጤና ኬላ", "ጤ/ሚ": "ጤና ሚኒስቴር",
    "ጤ/ቢሮ": "ጤና ቢሮ", "ሆ/ል": "ሆስፒታል", "ዩ/ቲ": "ዩኒቨርሲቲ", "ዩኒ/ቲ": "ዩኒቨርሲቲ", "ክ/ከ": "ክፍለ ከተማ", "ክ/ከተማ": "ክፍለ ከተማ",
    "ክ/ሀገር": "ክፍለ ሀገር", "ክ/ሃገር": "ክፍለ ሃገር", "ክ/አገር": "ክፍለ አገር", "ክ/ጦር": "ክፍለ ጦር", "ክ/ዘመን": "ክፍለ ዘመን",
    "ቤ/ክ": "ቤተ ክርስቲያን", "ቤ/ክርስቲያን": "ቤተ ክርስቲያን", "ቤ/መ": "ቤተ መንግሥት", "ቤ/መንግሥት": "ቤተ መንግሥት",
    "ቤ/መንግስት": "ቤተ መንግስት", "ቤ/ክህነት": "ቤተ ክህነት", "ቤ/መጻሕፍት": "ቤተ መጻሕፍት", "ሥ/አስኪያጅ": "ሥራ አስኪያጅ",
    "ስ/አስኪያጅ": "ሥራ አስኪያጅ", "ሥ/አስፈፃሚ": "ሥራ አስፈፃሚ", "ሥ/አስፈጻሚ": "ሥራ አስፈጻሚ", "ሥ/አ/ኮ": "ሥራ አስፈጻሚ ኮሚቴ",
    "ማ/ኮ": "ማዕከላዊ ኮሚቴ", "ማ/ኮሚቴ": "ማዕከላዊ ኮሚቴ", "ው/ጉ/ሚ": "ውጭ ጉዳይ ሚኒስቴር", "ው/ጉ/ሚ/ር": "ውጭ ጉዳይ ሚኒስቴር",
    "ው/ጉዳይ": "ውጭ ጉዳይ", "ጉ/ሚ": "ጉዳይ ሚኒስቴር", "መ/ሚ": "መከላከያ ሚኒስቴር", "ገ/ሚ": "ገንዘብ ሚኒስቴር", "ፌ/ፖሊስ": "ፌደራል ፖሊስ",
    "ፌ/ፖ": "ፌደራል ፖሊስ", "ፌ/ጠ/ፍ/ቤት": "ፌደራል ጠቅላይ ፍርድ ቤት", "ፌ/ከ/ፍ/ቤት": "ፌደራል ከፍተኛ ፍርድ ቤት", "ፌ/ፍ/ቤት": "ፌደራል ፍርድ ቤት",
    "ኤ/ማ/ሹም": "ኤታማዦር ሹም", "ዐ/ሕግ": "ዐቃቤ ሕግ", "ዓ/ሕግ": "ዐቃቤ ሕግ", "አ/ሕግ": "ዐቃቤ ሕግ", "ዐ/ህግ": "ዐቃቤ ሕግ", "ዓ/ህግ": "ዐቃቤ ሕግ",
    "አ/ህግ": "ዐቃቤ ሕግ", "መ/ቅ": "መጽሐፍ ቅዱስ", "መ/ቅዱስ": "መጽሐፍ ቅዱስ", "ህ/ሰብ": "ኅብረተሰብ", "ኅ/ሰብ": "ኅብረተሰብ",
    "ኃ/የተ": "ኃላፊነቱ የተወሰነ", "ኃ/የተ/የግ": "ኃላፊነቱ የተወሰነ የግል", "ኃ/የተ/የግል": "ኃላፊነቱ የተወሰነ የግል", "ሃ/የተ": "ኃላፊነቱ የተወሰነ",
    "ኃ/የተ/የግ/ማ": "ኃላፊነቱ የተወሰነ የግል ማኅበር", "ኃ/የተ/የግል/ማ": "ኃላፊነቱ የተወሰነ የግል ማኅበር", "ሃ/የተ/የግ/ማ": "ኃላፊነቱ የተወሰነ የግል ማኅበር",
    "ሀ/የተ/የግ/ማ": "ኃላፊነቱ የተወሰነ የግል ማኅበር", "ኃላ/የተ/የግ/ማ": "ኃላፊነቱ የተወሰነ የግል ማኅበር", "ኃ/የተ/የግ/ማህበር": "ኃላፊነቱ የተወሰነ የግል ማኅበር",
    "ኃ/የተ/የግል/ማህበር": "ኃላፊነቱ የተወሰነ የግል ማኅበር", "አ/ማ": "አክሲዮን ማኅበር", "አ/ማህበር": "አክሲዮን ማኅበር", "አ/ማኅበር": "አክሲዮን ማኅበር",
    "የተ/መ/ድ": "የተባበሩት መንግሥታት ድርጅት", "ተ/መ/ድ": "የተባበሩት መንግሥታት ድርጅት", "አ/አ/ድ": "የአፍሪካ አንድነት ድርጅት",
    "ኢ/ፌ/ዴ/ሪ": "የኢትዮጵያ ፌዴራላዊ ዴሞክራሲያዊ ሪፐብሊክ", "ኢ/ፌ/ዲ/ሪ": "የኢትዮጵያ ፌዴራላዊ ዲሞክራሲያዊ ሪፐብሊክ",
    "ኢ/ኦ/ተ/ቤ/ክ": "የኢትዮጵያ ኦርቶዶክስ ተዋሕዶ ቤተ ክርስቲያን", "ኦ/ተ/ቤ/ክ": "ኦርቶዶክስ ተዋሕዶ ቤተ ክርስቲያን",
    # law
    "ሥ/ሥ": "ሥነ ሥርዓት", "ሥ/ሥ/ሕ/ቁ": "ሥነ ሥርዓት ሕግ ቁጥር", "ወ/መ/ሕ": "ወንጀለኛ መቅጫ ሕግ", "ወ/መ/ሕግ": "ወንጀለኛ መቅጫ ሕግ",
    "ወ/መ/ሕ/ቁ": "ወንጀለኛ መቅጫ ሕግ ቁጥር", "ወ/ሕ/ቁ": "ወንጀል ሕግ ቁጥር", "ወ/ሕግ": "ወንጀል ሕግ", "ፍ/ሕግ": "ፍትሐ ብሔር ሕግ",
    "ፍ/ብ/ሕ/ቁ": "ፍትሐ ብሔር ሕግ ቁጥር", "ፍ/ሕ/ቁ": "ፍትሐ ብሔር ሕግ ቁጥር",
    "ፍ/ብ/መ/ቁ": "ፍትሐ ብሔር መዝገብ ቁጥር", "መዝ/ቁ": "መዝገብ ቁጥር", "ፍ/ብ/ሥ/ሥ/ሕ/ቁ": "ፍትሐ ብሔር ሥነ ሥርዓት ሕግ ቁጥር", "ፍ/ብሔር": "ፍትሐ ብሔር",
    # places
    "አ/አ": "አዲስ አበባ", "አ/ዘመን": "አዲስ ዘመን",
    "አ/አበባ": "አዲስ አበባ", "አ/አ/ዩ": "አዲስ አበባ ዩኒቨርሲቲ", "ድ/ዳ": "ድሬ ዳዋ", "ድ/ዳዋ": "ድሬ ዳዋ",
    "ሀ/ስብከት": "ሀገረ ስብከት", "ም/ራቅ": "ምሥራቅ", "ም/ዕራብ": "ምዕራብ", "ሰ/ምዕራብ": "ሰሜን ምዕራብ", "ሰ/ምሥራቅ": "ሰሜን ምሥራቅ",
    "ደ/ምዕራብ": "ደቡብ ምዕራብ", "ደ/ምሥራቅ": "ደቡብ ምሥራቅ", "ባ/ዳር": "ባሕር ዳር",
    "ደ/ብርሃን": "ደብረ ብርሃን", "ደ/ማርቆስ": "ደብረ ማርቆስ", "ደ/ታቦር": "ደብረ ታቦር", "ደ/ዘይት": "ደብረ ዘይት",
    "ደ/ሊባኖስ": "ደብረ ሊባኖስ", "ደ/ኤልያስ": "ደብረ ኤልያስ", "ደ/አፍሪካ": "ደቡብ አፍሪካ", "ደ/ወሎ": "ደቡብ ወሎ", "ደ/ጎንደር": "ደቡብ ጎንደር",
    "ደ/ሱዳን": "ደቡብ ሱዳን", "ደ/ኮሪያ": "ደቡብ ኮሪያ", "ደ/ኦሞ": "ደቡብ ኦሞ", "ሰ/ሸዋ": "ሰሜን ሸዋ", "ሰ/ወሎ": "ሰሜን ወሎ",
    "ሰ/ጎንደር": "ሰሜን ጎንደር", "ሰ/ኮሪያ": "ሰሜን ኮሪያ", "ሰ/አሜሪካ": "ሰሜን አሜሪካ", "ቅ/ማርያም": "ቅድስት ማርያም", "ቅ/ሥላሴ": "ቅድስት ሥላሴ",
    "ቅ/ስላሴ": "ቅድስት ሥላሴ", "ቅ/ድንግል": "ቅድስት ድንግል", "ኪ/ምሕረት": "ኪዳነ ምሕረት", "ኪ/ምህረት": "ኪዳነ ምሕረት", "ኪ/ማርያም": "ኪዳነ ማርያም",
    "ፍ/ማርያም": "ፍቅረ ማርያም", "ፍ/ሥላሴ": "ፍቅረ ሥላሴ", "ፍ/ስላሴ": "ፍቅረ ሥላሴ", "ሣ/ማርያም": "ሣህለ ማርያም", "ሣ/ሥላሴ": "ሣህለ ሥላሴ",
    # numbers and measures
    "ተ/ቁ": "ተራ ቁጥር", "ስ/ቁ": "ስልክ ቁጥር", "መ/ቁ": "መለያ ቁጥር", "ቤ/ቁ": "ቤት ቁጥር", "ሂ/ቁ": "ሒሳብ ቁጥር", "ሒ/ቁ": "ሒሳብ ቁጥር",
    "ፖ/ሣ/ቁ": "ፖስታ ሣጥን ቁጥር", "ፖ/ሳ/ቁ": "ፖስታ ሣጥን ቁጥር", "ፖ/ሣ": "ፖስታ ሣጥን", "ፖ/ሳ": "ፖስታ ሣጥን",
    "ኪ/ሜ": "ኪሎ ሜትር", "ሴ/ሜ": "ሴንቲ ሜትር", "ሳ/ሜ": "ሴንቲ ሜትር", "ሚ/ሜ": "ሚሊ ሜትር", "ኪ/ግ": "ኪሎ ግራም", "ሚ/ግ": "ሚሊ ግራም",
    "ሚ/ሊ": "ሚሊ ሊትር", "ካ/ሜ": "ካሬ ሜትር", "ካሬ/ሜ": "ካሬ ሜትር", "ስኩ/ሜ": "ስኩዌር ሜትር", "ካ/ኪ/ሜ": "ካሬ ኪሎ ሜትር",
    "ካሬ/ኪ/ሜ": "ካሬ ኪሎ ሜትር", "ስኩ/ኪ/ሜ": "ስኩዌር ኪሎ ሜትር", "ኪ/ሜ/ሰ": "ኪሎ ሜትር በሰዓት", "ኪ/ሜ/ሰዓት": "ኪሎ ሜትር በሰዓት",
    "ሜ/ሰ": "ሜትር በሰከንድ",
    "ሴ/ግ": "ሴንቲግሬድ", "ኪዩ/ሜ": "ኪዩቢክ ሜትር", "ሜ/ኩ": "ሜትር ኩብ",
    "ሜ/ኩብ": "ሜትር ኩብ", "ኪ/ዋ": "ኪሎ ዋት", "ሜ/ዋ": "ሜጋ ዋት", "ጊ/ዋ": "ጊጋ ዋት", "ኪ/ዋ/ሰ": "ኪሎ ዋት ሰዓት",
    "ሄ/ር": "ሄክታር", "ኩ/ል": "ኩንታል", "ሊ/ር": "ሊትር", "ዲ/ሴ": "ዲግሪ ሴንቲግሬድ", "ዲ/ግ": "ዲግሪ", "ሜ/ቶን": "ሜትሪክ ቶን",
}
# A letter in front of a whole word. መ/, አ/, ደ/ and others have several readings and are in WHOLE, word by word.
INITIALS = {"ገ": "ገብረ", "ወ": "ወልደ", "ኃ": "ኃይለ", "ሃ": "ኃይለ", "ሀ": "ኃይለ", "ሐ": "ኃይለ", "ኅ": "ኃይለ", "ተ": "ተክለ",
            "ም": "ምክትል", "ጠ": "ጠቅላይ", "ዋ": "ዋና", "ረ": "ረዳት", "ሊ": "ሊቀ", "ቤ": "ቤተ", "ቅ": "ቅዱስ", "ጤ": "ጤና",
            "ፌ": "ፌደራል", "ር": "ርዕሰ"}
EAST_OR_WEST = re.compile("ሸዋ|ጎጃም|ጐጃም|ሐረርጌ|ሀረርጌ|ወለጋ|አፍሪካ|አውሮፓ|እስያ|አርሲ|ጉጂ")  # ም/ before them is either
LETTER_NAME = re.compile(rf".?(?:[{ETHIOPIC}]|ኤ[ፍችልምንስክ]|አይ|አር|ኪው|ደብሊው|ኤክስ|ዋይ|ዜድ|ዲ|ጄ)")  # perhaps after a prefix
OFFICES = re.compile("ዋና|ም$|ምክትል|ፕሬ|ኮሚ|ኃላፊ|ሥራ|አስተዳዳሪ|ሊቀ")  # whose acting holder ተ/ is
KEYS = {tuple(key.split("/")): words for key, words in WHOLE.items()}
LONGEST = max(map(len, KEYS))

# Words that are abbreviations without a sign, or with one full stop.
SINGLE = {"ዶር": "ዶክተር", "እኤአ": "እንደ አውሮፓውያን አቆጣጠር", "ፕሮፍ": "ፕሮፌሰር", "ኢንጂ": "ኢንጂነር", "ቁ": "ቁጥር", "ተቁ": "ተራ ቁጥር",
          "ሞባ": "ሞባይል", "ገ": "ገጽ", "ምዕ": "ምዕራፍ", "አን": "አንቀጽ"}
BARE = re.compile(rf"(?<![{ETHIOPIC}./])([የበለከ]?)(ዶር|እኤአ)[.]?(?![{ETHIOPIC}/])")
DOTTED_WORD = re.compile(rf"(?<![{ETHIOPIC}./])([የበለከ]?)(ፕሮፍ|ኢንጂ|ዶር)\. ?(?=[{ETHIOPIC}])")
BEFORE_DIGIT = re.compile(rf"(?<![{ETHIOPIC}./])([የበለከ]?)(ተቁ|ቁ|ገ|ምዕ|አን|ሞባ)[.] ?(?=[0-9፩-፼])|"
                          rf"(?<![{ETHIOPIC}./])([የበለከ]?)(ተቁ|ቁ) ?(?=[0-9፩-፼])")
ERA_WITHOUT_DOTS = re.compile(rf"(?<=[0-9፩-፼]) ?ዓም([.]?)(?![{ETHIOPIC}])")
UNIT_BEHIND = re.compile(rf"(?<=[0-9]) ?(ሜ|ግ|ሊ|ሚ|ቢ)(\.)(?![{ETHIOPIC}])|(?<=[0-9])(ሜ|ግ|ሊ)(?![{ETHIOPIC}./²³])")
PER_HOUR = re.compile(rf"(?<=ኪሎ ሜትር)/(?:ሰ|ሰዓት)(?![{ETHIOPIC}])[.]?")
BARE_UNIT = re.compile(rf"(?<=[0-9]) ?(ኪሜ|ሴሜ|ሳሜ|ሚሜ|ኪግ|ሚግ)(?![{ETHIOPIC}])[.]?|(?<![{ETHIOPIC}])በ(ኪሜ)(?![{ETHIOPIC}])")
RAISED = re.compile(rf"((?:ኪሎ |ሴንቲ |ሚሊ )?ሜትር|(?<=[0-9])ሜ|(?<=[0-9] )ሜ){STOP}? ?([²³])")
# A slash of a rate: birr per kilogram. A currency or a word with በ behind it is none.
RATE = re.compile(rf"(?<=[0-9፩-፼])( ?(?:{SCALE_WORDS})?(?: ?(?:ብር|ኪ\.ግ\.?|ኪሎ(?: ?ግራም)?|ኩ/ል|ኩንታል|ሊትር|ሜትር|ቶን))?)"
                  rf"(?<![0-9፩-፼])/(?=[{ETHIOPIC}])(?!ሰ(?:ዓት)?(?![{ETHIOPIC}])|ብር|ዶላር|ዩሮ|ሳንቲም|በ(?!ርሜል))")
UNIT_LETTERS = {"ሜ": "ሜትር", "ግ": "ግራም", "ሊ": "ሊትር", "ሚ": "ሚሊዮን", "ቢ": "ቢሊዮን"}
# A minister where a person follows; else WHOLE takes the ministry.
MINISTER = re.compile(r"(ው/)?((?<!/)|ጉ/)ሚ(?:/ር|(?<=ጉ/ሚ))"
                      r"(?= ?(?:ዶ/ር|ዶክተር|አቶ|ወ/ሮ|ወይዘሮ|ክቡር|ክብርት|ኢ/ር|ፕ/ር|አምባሳደር))")
SPACED = re.compile(rf"(?<![{ETHIOPIC}])(?:[{ETHIOPIC}]{{1,3}}(?:\. ?| ?/ ?)){{1,9}}+"
                    rf"[{ETHIOPIC}]{{1,4}}(?![{ETHIOPIC}])[./]?")
SIGN = re.compile(r"\. ?| ?/ ?")
TOKEN = re.compile(rf"(?<![{ETHIOPIC}])[{ETHIOPIC}]++(?:[./][{ETHIOPIC}]++)++(/(?![{ETHIOPIC}0-9])|\.(?!\.))?")
INITIAL_SPACE = re.compile(rf"(?<![{ETHIOPIC}./])([የበለከ]?)(ገ|ወ|ኃ|ሃ|ም|ጠ|ብ/ጄ|ሜ/ጄ|ሌ/ጄ|ሌ/ኮ|ጠ/ሚ|ጠ/ሚ/ር|ፕ/ር|ዶ/ር|ኮ/ል)/ "
                           rf"(?=[{ETHIOPIC}]{{2}})")


def family(letter: str) -> int:
    """The number that the orders of one Ethiopic consonant share."""
    return ord(letter) // 8


def inflected(key: tuple[str, ...], parts: tuple[str, ...], words: str) -> str | None:
    """The words of `key` with the ending of `parts`, whose last part goes on beyond the key's, or None."""
    if key[:-1] != parts[:-1]:
        return None
    last, mine = key[-1], parts[-1]
    head, _, final = words.rpartition(" ")
    if last == mine:
        return words
    size = len(last)
    if len(mine) >= size and mine[: size - 1] == last[:-1] and family(mine[size - 1]) == family(last[-1]) == (
            family(words[-1])) and NOUN_ENDING.fullmatch(mine[size:]):
        return words[:-1] + mine[size - 1 :]  # ዶ/ሩ
    if mine.startswith(last) and NOUN_ENDING.fullmatch(mine[size:]):
        return attach(words, mine[size:])  # ኪ.ሜ.ን
    if mine[0] == final[0] and len(mine) >= (2 if len(last) > 1 else 3) and (
            mine.startswith(final[:-1]) or (len(last) == 1 and mine[:2] == final[:2])):
        return f"{head} {mine}".strip()  # ት/ቤቱ, ጠ/ሚኒስትር
    return None


BY_HEAD: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
for _key, _words in KEYS.items():
    BY_HEAD.setdefault(_key[:-1], []).append((_key, _words))


@functools.lru_cache(maxsize=4096)
def look_up(parts: tuple[str, ...]) -> str | None:
    """The words of an abbreviation with its prefix and its ending, or None."""
    for prefix in PREFIXES:
        if not parts[0].startswith(prefix) or parts[0] == prefix:
            continue
        bare = (parts[0].removeprefix(prefix), *parts[1:])
        found = KEYS.get(bare) or next(filter(None, (inflected(key, bare, words) for key, words in
                                                     BY_HEAD.get(bare[:-1], []))), None)
        if found:
            return prefix + (found.removeprefix("የ") if prefix and found.startswith("የ") else found)
    return None


def initial(part: str, following: str) -> str | None:
    """ገ before a word as ገብረ, with its prefix; None where the letter stands for no one word."""
    for prefix in PREFIXES:
        letter = part.removeprefix(prefix)
        if part.startswith(prefix) and letter in INITIALS and (len(following) > 1 or letter in "ምዋተፌጠረ") and not (
                letter == "ም" and EAST_OR_WEST.match(following)):
            return prefix + ("ተጠባባቂ" if letter == "ተ" and OFFICES.match(following) else INITIALS[letter])
    return None


def acronym(parts: list[str], signs: list[str]) -> int:
    """How many parts from the first on are names of letters with full stops between, none of them in the table."""
    size = 1 if len(parts[0]) <= 4 and LETTER_NAME.fullmatch(parts[0][-3:]) else 0
    while size and size < len(parts) and signs[size - 1] == "." and LETTER_NAME.fullmatch(parts[size]):
        size += 1
    return 0 if any(look_up(tuple(parts[:n])) for n in range(2, min(size, LONGEST) + 1)) else size


def resolve(parts: list[str], signs: list[str]) -> tuple[str, bool]:
    """The words of a chain such as ም/ጠ/ሚ/ር, and whether it ends in an abbreviation.

    The longest known stretch comes first; an acronym is one word (ኢ.ዜ.አ).
    """
    said, at, size, known = "", 0, acronym(parts, signs), False
    if size > 1:
        said, at, known = "".join(parts[:size]) + " ", size, True
    while at < len(parts):
        for size in range(min(LONGEST, len(parts) - at), 1, -1):
            if words := look_up(tuple(parts[at : at + size])):
                known = True
                break
        else:
            size, following = 1, parts[at + 1] if at + 1 < len(parts) else ""
            words = (initial(parts[at], following) if following else None) or parts[at]
            known = False
            if following and signs[at] == "." and words == parts[at] and len(words) > 1 and len(following) > 1:
                words += "."  # two sentences without a space between
        said += words + " "
        at += size
    return said.strip(), known


def say_abbreviations(text: str, notes: Notes) -> str:
    """A text with its abbreviations in full. A full stop that belongs to one becomes STOP or goes."""
    def spaced(match: re.Match[str]) -> str:
        """Only what the table knows: ዓ. ም. and ጠ/ ሚ; the rest of the chain stays as it is."""
        parts, signs = SIGN.split(match[0]), [*SIGN.findall(match[0]), ""]
        said, at = "", 0
        while at < len(parts):
            for size in range(min(LONGEST, len(parts) - at), 1, -1):
                between = "".join(signs[at : at + size - 1])
                if " " in between and all(parts[at : at + size]) and (words := look_up(tuple(parts[at : at + size]))):
                    break
            else:
                size, words = 1, parts[at]
            sign = signs[at + size - 1] if at + size <= len(signs) else ""
            said += words + (STOP + sign[1:] if size > 1 and sign.startswith(".") else sign)
            at += size
        return said

    def token(match: re.Match[str]) -> str:
        ending = match[1] or ""
        body = match[0][: len(match[0]) - len(ending)]
        parts = re.split("[./]", body)
        if match.string[max(0, match.start() - 1) : match.start()].isnumeric() and ENDING.fullmatch(parts[0]):
            return match[0]  # 5ኛ.ሰላም
        signs = re.findall("[./]", body)
        words, known = resolve(parts, signs)
        stop = STOP if known and (signs[-1] == "." or len(parts[-1]) == 1) else "."  # ዓ.ም. and ዶ/ር., not ት/ቤት.
        return words + {"": "", ".": stop, "/": " "}[ending]

    def raised(match: re.Match[str]) -> str:
        name = match[1] if len(match[1]) > 1 else " ሜትር"
        return f"ካሬ {name.strip()}" if match[2] == "²" else f"{name} ኩብ"

    def single(match: re.Match[str]) -> str:
        prefix, word = (group for group in match.groups() if group is not None)
        return f"{prefix}{SINGLE[word]} "

    text = notes.sub("abbreviation", MINISTER, lambda match: ("ውጭ " if match[1] else "") + (
        "ጉዳይ " if match[2] else "") + "ሚኒስትር", text)
    text = notes.sub("rate", RATE, r"\1 በ", text, "/")
    text = notes.sub("abbreviation", INITIAL_SPACE, r"\1\2/", text)
    text = notes.sub("abbreviation", BARE, lambda match: match[1] + SINGLE[match[2]], text)
    text = notes.sub("abbreviation", DOTTED_WORD, single, text)
    text = notes.sub("abbreviation", BEFORE_DIGIT, single, text)
    text = notes.sub("abbreviation", ERA_WITHOUT_DOTS, lambda match: " ዓመተ ምሕረት" + STOP * len(match[1]), text)
    text = notes.sub("abbreviation", UNIT_BEHIND, lambda match: f" {UNIT_LETTERS[match[1] or match[3]]}" + (
        STOP if match[2] else ""), text)
    text = notes.sub("abbreviation", BARE_UNIT, lambda match: f" {WHOLE['/'.join(match[1])]}" if match[1] else
                     "በ" + WHOLE["/".join(match[2])], text)
    text = notes.sub("unit", PER_HOUR, " በሰዓት", text)
    text = notes.sub("abbreviation", SPACED, spaced, text)
    text = notes.sub("abbreviation", TOKEN, token, text)
    return notes.sub("unit", RAISED, raised, text)
