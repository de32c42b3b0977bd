"""The words of the trade: every value as shops abbreviate and translate it.

One value a line: canonical | abbreviated | German | French | Spanish | Italian. An empty
abbreviation means that the vowels go.
"""

import re

LANGUAGES = ("en", "short", "de", "fr", "es", "it")

_TABLE = """
black | blk | schwarz | noir | negro | nero
white | wht | weiß | blanc | blanco | bianco
grey | gry | grau | gris | gris | grigio
navy | nvy | marineblau | bleu marine | azul marino | blu navy
blue | blu | blau | bleu | azul | blu
teal | | petrol | bleu canard | verde azulado | ottanio
green | grn | grün | vert | verde | verde
olive | | oliv | kaki | oliva | oliva
yellow | ylw | gelb | jaune | amarillo | giallo
orange | orng | orange | orange | naranja | arancione
red | rd | rot | rouge | rojo | rosso
burgundy | burg | weinrot | bordeaux | burdeos | bordò
pink | pnk | rosa | rose | rosa | rosa
purple | prpl | lila | violet | morado | viola
beige | bge | beige | beige | beige | beige
brown | brwn | braun | marron | marrón | marrone
gold | gld | gold | doré | dorado | oro
silver | slvr | silber | argenté | plateado | argento
rose gold | r.gold | roségold | or rose | oro rosa | oro rosa
oak | | Eiche | chêne | roble | rovere
walnut | wlnt | Nussbaum | noyer | nogal | noce
plain | | uni | uni | liso | tinta unita
striped | strp | gestreift | rayé | a rayas | a righe
dotted | dots | gepunktet | à pois | de lunares | a pois
checked | chkd | kariert | à carreaux | a cuadros | a quadri
floral | flrl | geblümt | à fleurs | floral | a fiori
zigzag | zgzg | Zickzack | zigzag | zigzag | zigzag
quilted | qltd | gesteppt | matelassé | acolchado | trapuntato
two-tone | 2-tone | zweifarbig | bicolore | bicolor | bicolore
camouflage | camo | Tarnmuster | camouflage | camuflaje | mimetico
pleated | pltd | plissiert | plissé | plisado | plissettato
cotton | ctn | Baumwolle | coton | algodón | cotone
satin | | Satin | satin | satén | raso
knit | | Strick | maille | punto | maglia
linen | lnn | Leinen | lin | lino | lino
denim | dnm | Jeansstoff | jean | vaquero | denim
leather | lthr | Leder | cuir | cuero | pelle
suede | sde | Wildleder | daim | ante | camoscio
canvas | cnvs | Segeltuch | toile | lona | tela
wicker | wckr | Korbgeflecht | osier | mimbre | vimini
nylon | nyl | Nylon | nylon | nailon | nylon
straw | | Stroh | paille | paja | paglia
felt | | Filz | feutre | fieltro | feltro
velvet | vlvt | Samt | velours | terciopelo | velluto
wool | | Wolle | laine | lana | lana
rattan | rttn | Rattan | rotin | ratán | rattan
steel | stl | Edelstahl | inox | acero | acciaio
glass | | Glas | verre | vidrio | vetro
plastic | plstc | Kunststoff | plastique | plástico | plastica
round neck | rnd nck | Rundhals | col rond | cuello redondo | girocollo
v-neck | v-nck | V-Ausschnitt | col V | cuello V | scollo a V
square neck | sq nck | Karree-Ausschnitt | col carré | escote cuadrado | scollo quadrato
boat neck | boat nck | U-Boot-Ausschnitt | col bateau | cuello barco | scollo a barca
halter neck | halter | Neckholder | dos nu | cuello halter | all'americana
sleeveless | slvless | ärmellos | sans manches | sin mangas | smanicato
short sleeves | sh slv | kurzarm | manches courtes | manga corta | maniche corte
long sleeves | lg slv | langarm | manches longues | manga larga | maniche lunghe
puff sleeves | puff slv | Puffärmel | manches ballon | mangas abullonadas | maniche a sbuffo
rolled sleeves | roll slv | Krempelärmel | manches roulées | manga remangada | maniche arrotolate
mini | | mini | court | mini | mini
knee length | knee lgth | knielang | mi-long | hasta la rodilla | al ginocchio
maxi | | bodenlang | long | largo | lungo
no belt | | ohne Gürtel | sans ceinture | sin cinturón | senza cintura
belted | w/ belt | mit Gürtel | ceinturé | con cinturón | con cintura
bow waist | bow | mit Schleife | nœud à la taille | lazo en la cintura | fiocco in vita
straight hem | str hem | gerader Saum | ourlet droit | bajo recto | orlo dritto
flared hem | flare | ausgestellt | évasé | acampanado | svasato
ruffled hem | rffl | Volantsaum | à volants | con volantes | con balze
curved hem | crv hem | runder Saum | ourlet arrondi | bajo curvo | orlo curvo
classic collar | clsc clr | Kentkragen | col classique | cuello clásico | collo classico
mandarin collar | mao clr | Stehkragen | col mao | cuello mao | collo coreano
crew neck | crew | Rundkragen | ras du cou | cuello caja | collo tondo
button-down collar | btn-dwn | Button-down | col boutonné | cuello abotonado | collo button-down
full buttons | btns | Knopfleiste | boutonné | abotonado | abbottonato
half placket | 1/2 plckt | halbe Knopfleiste | demi-patte | media tapeta | mezza abbottonatura
full zip | zip | Reißverschluss | zippé | cremallera | con zip
no pocket | no pkt | ohne Tasche | sans poche | sin bolsillo | senza tasca
chest pocket | pkt | Brusttasche | poche poitrine | bolsillo en el pecho | taschino
one pocket | 1 pkt | eine Tasche | une poche | un bolsillo | una tasca
two pockets | 2 pkts | zwei Taschen | deux poches | dos bolsillos | due tasche
low top | low | niedrig | basse | bajo | basso
mid top | mid | halbhoch | mi-haute | media caña | medio
high top | hi top | hoch | montante | alto | alto
laces | lace-up | Schnürer | lacets | cordones | lacci
velcro | vlcr | Klett | scratch | velcro | strappo
buckle | bckl | Schnalle | boucle | hebilla | fibbia
slip-on | slipon | Schlupf | sans lacets | sin cordones | senza lacci
flat | | flach | plat | plano | piatto
wedge | wdg | Keilabsatz | compensé | cuña | zeppa
block heel | blk heel | Blockabsatz | talon carré | tacón ancho | tacco largo
round toe | rnd toe | runde Spitze | bout rond | punta redonda | punta tonda
cap toe | cap | Zehenkappe | bout renforcé | puntera | puntale
pointed toe | pt toe | spitz | bout pointu | punta fina | punta stretta
no logo | | ohne Logo | sans logo | sin logo | senza logo
side stripes | stripes | Seitenstreifen | bandes | bandas laterales | strisce
star logo | star | Stern | étoile | estrella | stella
tote | | Shopper | cabas | tote | shopper
saddle bag | saddle | Satteltasche | besace | bandolera | tracolla
box bag | box | Kastentasche | sac boîte | bolso caja | bauletto
bucket bag | bucket | Beuteltasche | sac seau | bolso saco | secchiello
top handle | top hndl | Henkel | anse | asa | manico
two handles | 2 hndls | zwei Henkel | deux anses | dos asas | due manici
shoulder strap | sh strap | Schulterriemen | bandoulière | correa | a spalla
chain strap | chain | Kette | chaîne | cadena | catena
zip | | Reißverschluss | fermeture éclair | cremallera | cerniera
flap | | Überschlag | rabat | solapa | patta
turn lock | lock | Drehverschluss | fermoir | cierre giratorio | chiusura girevole
bow | | Schleife | nœud | lazo | fiocco
no charm | | ohne Anhänger | sans breloque | sin colgante | senza ciondolo
tassel | tssl | Quaste | pompon | borla | nappa
scarf | scrf | Tuch | foulard | pañuelo | foulard
rounded | rnd | abgerundet | arrondi | redondeado | arrotondato
square | sq | eckig | carré | cuadrado | quadrato
slim | | schmal | fin | estrecho | sottile
roll top | rolltop | Rolltop | enroulable | enrollable | arrotolabile
no side pocket | | ohne Seitentasche | sans poche latérale | sin lateral | senza laterale
side pockets | side pkt | Seitentaschen | poches latérales | bolsillos laterales | tasche laterali
beanie | bnie | Mütze | bonnet | gorro | berretto
baseball cap | cap | Basecap | casquette | gorra | cappellino
fedora | fdra | Fedora | fédora | fedora | fedora
bucket hat | bckt | Fischerhut | bob | pescador | pescatore
sun hat | sun | Sonnenhut | capeline | pamela | cappello da sole
no band | | ohne Band | sans ruban | sin cinta | senza nastro
no ornament | | schlicht | sans ornement | sin adorno | senza ornamento
pompom | pom | Bommel | pompon | pompón | pompon
feather | fthr | Feder | plume | pluma | piuma
patch | | Aufnäher | écusson | parche | toppa
low crown | low crn | flache Krone | calotte basse | copa baja | calotta bassa
high crown | hi crn | hohe Krone | calotte haute | copa alta | calotta alta
narrow brim | nrw brim | schmale Krempe | bord étroit | ala corta | tesa stretta
wide brim | wd brim | breite Krempe | bord large | ala ancha | tesa larga
round | rnd | rund | rond | redondo | rotondo
tonneau | tonn | tonneau | tonneau | tonneau | tonneau
leather strap | lthr strp | Lederband | bracelet cuir | correa de piel | cinturino pelle
steel links | stl lnks | Gliederband | maillons acier | eslabones | maglia acciaio
rubber strap | rbbr | Kautschukband | bracelet caoutchouc | correa de caucho | cinturino gomma
textile strap | nato | Textilband | bracelet tissu | correa textil | cinturino tessuto
no numerals | | ohne Ziffern | sans index | sin números | senza indici
bars | | Strichindex | index bâtons | índices | indici
dots | | Punktindex | index points | puntos | punti
roman numerals | roman | römische Ziffern | chiffres romains | números romanos | numeri romani
smooth bezel | smth | glatte Lünette | lunette lisse | bisel liso | lunetta liscia
diver bezel | diver | Taucherlünette | lunette plongée | bisel buceo | lunetta sub
no date | | ohne Datum | sans date | sin fecha | senza data
date window | date | Datum | guichet date | fecha | datario
chronograph | chrono | Chronograph | chronographe | cronógrafo | cronografo
moon phase | moon | Mondphase | phase de lune | fase lunar | fasi lunari
quartz | qtz | Quarz | quartz | cuarzo | quarzo
automatic | auto | Automatik | automatique | automático | automatico
solar | slr | Solar | solaire | solar | solare
straight | strt | gerade | droit | recto | dritto
tapered | tprd | konisch | conique | cónico | conico
belly | | bauchig | rebondi | panzudo | bombato
flared | flrd | geschwungen | évasé | abierto | svasato
round handle | rnd hndl | runder Henkel | anse ronde | asa redonda | manico tondo
square handle | sq hndl | eckiger Henkel | anse carrée | asa cuadrada | manico quadro
ear handle | ear hndl | Ohrhenkel | anse oreille | asa de oreja | manico a orecchio
no handle | no hndl | ohne Henkel | sans anse | sin asa | senza manico
glossy | gloss | glänzend | brillant | brillante | lucido
matte | mtt | matt | mat | mate | opaco
speckled | spckl | gesprenkelt | moucheté | moteado | maculato
plain base | | einfacher Boden | fond simple | base lisa | base semplice
footed | ftd | mit Fuß | sur pied | con pie | con piede
dipped base | dip | getaucht | bicolore trempé | base bañada | base immersa
no rim line | | ohne Rand | sans liseré | sin borde | senza bordo
gold rim | gld rim | Goldrand | liseré doré | borde dorado | bordo oro
dark rim | drk rim | dunkler Rand | liseré foncé | borde oscuro | bordo scuro
cylinder | cyl | Zylinder | cylindre | cilindro | cilindro
shoulder | shldr | Schulterform | épaulé | con hombros | a spalla
hourglass | hrgls | tailliert | sablier | reloj de arena | clessidra
screw cap | screw | Schraubdeckel | bouchon à vis | tapón de rosca | tappo a vite
flip cap | flip | Klappdeckel | clapet | tapa abatible | tappo a scatto
straw cap | straw | Strohhalm | paille | pajita | cannuccia
loop cap | loop | Trageschlaufe | bouchon à anse | tapón con asa | tappo con anello
no sleeve | | ohne Hülle | sans housse | sin funda | senza guaina
rubber boot | boot | Gummifuß | base caoutchouc | base de goma | base gomma
grip band | grip | Griffband | bande grip | banda de agarre | fascia grip
no print | | ohne Druck | sans motif | sin estampado | senza stampa
logo print | logo | Logodruck | logo imprimé | logo impreso | logo stampato
mountain print | mtn | Bergmotiv | motif montagne | montañas | stampa montagne
cone shade | cone | Kegelschirm | abat-jour conique | pantalla cónica | paralume conico
drum shade | drum | Trommelschirm | abat-jour tambour | pantalla tambor | paralume tamburo
dome shade | dome | Kuppelschirm | abat-jour dôme | pantalla cúpula | paralume cupola
globe shade | globe | Kugelschirm | abat-jour globe | pantalla globo | paralume globo
column base | clmn | Säulenfuß | pied colonne | base columna | base colonna
tripod base | tripod | Dreibein | trépied | trípode | treppiede
gourd base | gourd | Kürbisfuß | pied calebasse | base calabaza | base zucca
arched base | arch | Bogenfuß | pied arqué | base arco | base ad arco
no trim | | ohne Borte | sans galon | sin ribete | senza bordura
trim bands | trim | Bordüre | galon | ribete | bordura
fringe | frng | Fransen | franges | flecos | frange
no pull | | ohne Zug | sans tirette | sin tirador | senza tirante
pull chain | chain | Zugkette | tirette | cadena | catenella
cord switch | cord | Kabelschalter | interrupteur fil | interruptor cable | interruttore filo
tall | | hoch | haut | alto | alto
squat | sqt | gedrungen | trapu | achaparrado | basso
oval back | oval | ovale Lehne | dossier ovale | respaldo oval | schienale ovale
square back | sq bck | eckige Lehne | dossier carré | respaldo cuadrado | schienale quadro
wing back | wing | Ohrensessel | à oreilles | orejero | bergère
low back | low bck | niedrige Lehne | dossier bas | respaldo bajo | schienale basso
no stitching | | ohne Naht | sans couture | sin costuras | senza cuciture
buttoned | tufted | geknöpft | capitonné | capitoné | capitonné
channelled | chnl | Kanalsteppung | cannelé | acanalado | cannettato
cross stitch | x-stch | Kreuznaht | point croisé | punto cruz | punto croce
tapered legs | tpr legs | konische Beine | pieds fuselés | patas cónicas | gambe coniche
hairpin legs | hairpin | Haarnadelbeine | pieds épingle | patas horquilla | gambe a forcina
pedestal | pdstl | Tellerfuß | piétement central | pedestal | piedistallo
sled base | sled | Kufen | luge | trineo | slitta
block legs | blk legs | Blockbeine | pieds carrés | patas cuadradas | gambe quadre
no arms | armless | ohne Armlehnen | sans accoudoirs | sin brazos | senza braccioli
low arms | low arms | niedrige Armlehnen | accoudoirs bas | brazos bajos | braccioli bassi
high arms | hi arms | hohe Armlehnen | accoudoirs hauts | brazos altos | braccioli alti
no cushion | | ohne Kissen | sans coussin | sin cojín | senza cuscino
white cushion | wht cush | weißes Kissen | coussin blanc | cojín blanco | cuscino bianco
yellow cushion | ylw cush | gelbes Kissen | coussin jaune | cojín amarillo | cuscino giallo
two seats | 2-seat | Zweisitzer | deux places | dos plazas | due posti
three seats | 3-seat | Dreisitzer | trois places | tres plazas | tre posti
four seats | 4-seat | Viersitzer | quatre places | cuatro plazas | quattro posti
rolled arms | roll arms | runde Armlehnen | accoudoirs ronds | brazos redondos | braccioli tondi
square arms | sq arms | eckige Armlehnen | accoudoirs carrés | brazos rectos | braccioli quadri
slim arms | slm arms | schmale Armlehnen | accoudoirs fins | brazos finos | braccioli sottili
plain back | | glatte Lehne | dossier lisse | respaldo liso | schienale liscio
no pillows | | ohne Zierkissen | sans oreillers | sin almohadas | senza cuscini
white pillows | wht pllw | weiße Kissen | oreillers blancs | almohadas blancas | cuscini bianchi
yellow pillows | ylw pllw | gelbe Kissen | oreillers jaunes | almohadas amarillas | cuscini gialli
red pillows | rd pllw | rote Kissen | oreillers rouges | almohadas rojas | cuscini rossi
foam | | Schaumstoff | mousse | espuma | schiuma
down | | Daunen | duvet | plumas | piuma
springs | sprng | Federkern | ressorts | muelles | molle
14 l | 14L | 14 Liter | 14 litres | 14 litros | 14 litri
18 l | 18L | 18 Liter | 18 litres | 18 litros | 18 litri
22 l | 22L | 22 Liter | 22 litres | 22 litros | 22 litri
28 l | 28L | 28 Liter | 28 litres | 28 litros | 28 litri
1 l | 1L | 1 Liter | 1 litre | 1 litro | 1 litro
dress | drs | Kleid | robe | vestido | abito
shirt | shrt | Hemd | chemise | camisa | camicia
shoe | shoes | Schuh | chaussure | zapato | scarpa
handbag | bag | Handtasche | sac à main | bolso | borsa
backpack | bkpk | Rucksack | sac à dos | mochila | zaino
hat | | Hut | chapeau | sombrero | cappello
watch | wtch | Armbanduhr | montre | reloj | orologio
mug | | Becher | tasse | taza | tazza
bottle | btl | Trinkflasche | gourde | botella | borraccia
lamp | lmp | Lampe | lampe | lámpara | lampada
chair | chr | Stuhl | chaise | silla | sedia
sofa | sfa | Sofa | canapé | sofá | divano
@sole | {} sole | Sohle {} | semelle {} | suela {} | suola {}
@hardware | {} hardware | Beschläge {} | ferrures {} | herrajes {} | finiture {}
@trim | {} trim | Besatz {} | finitions {} | ribetes {} | profili {}
@band | {} band | Band {} | ruban {} | cinta {} | nastro {}
@case | {} case | Gehäuse {} | boîtier {} | caja {} | cassa {}
@dial | {} dial | Zifferblatt {} | cadran {} | esfera {} | quadrante {}
@inside | {} inside | innen {} | intérieur {} | interior {} | interno {}
@lid | {} lid | Deckel {} | bouchon {} | tapa {} | tappo {}
@finish | {} finish | {} | finition {} | acabado {} | finitura {}
"""

# How a careless seller names a colour; several colours share each word.
VAGUE = {
    **dict.fromkeys(("black", "navy", "burgundy", "brown", "purple", "olive"), "dark"),
    **dict.fromkeys(("white", "beige", "grey", "pink"), "light"),
    **dict.fromkeys(("blue", "teal", "green"), "cool tone"),
    **dict.fromkeys(("yellow", "orange", "red"), "bright"),
}


def _cells(line: str) -> tuple[str, ...]:
    english, short, *others = (cell.strip() for cell in line.split("|"))
    return (english, short or re.sub(r"(?<=\w)[aeiou]", "", english), *others)


_ROWS = {row[0]: row for row in (_cells(line) for line in _TABLE.strip().splitlines())}


def say(value: str, language: str, attribute: str = "") -> str:
    """The value in one of LANGUAGES, with a noun where it says too little alone ("white sole").

    Values that no table lists (330 ml, E27) are the same in every language.
    """
    column = LANGUAGES.index(language)
    word = _ROWS[value][column] if value in _ROWS else value
    frame = _ROWS.get(f"@{attribute}")
    if frame is None:
        return word
    return (frame[column] if column else frame[1]).replace("{}", word)
