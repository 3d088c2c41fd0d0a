package tokenizer

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/atoll-run/atoll/sandbox"
)

// The fields of SentencePiece's messages that count, by their numbers in its sentencepiece_model.proto.
const (
	modelPiece, modelTrainer, modelNormalizer = 1, 2, 3

	pieceText, pieceScore, pieceType = 1, 2, 3

	trainerType, trainerUnk, trainerBOS, trainerEOS = 3, 40, 41, 42
	trainerSuffix                                   = 24 // spaces end words rather than begin them

	normalizerMap, normalizerPrefix, normalizerTrim, normalizerEscape = 2, 3, 4, 5
)

// modelBPE is the one algorithm of SentencePiece's that merges.
const modelBPE = 2

// maxSentencePiece bounds a tokenizer.model, in bytes; the largest in use has 5 MB.
const maxSentencePiece = 64 << 20

// ReadSentencePiece reads a vocabulary from a tokenizer.model and, unless it is nil, the tokenizer_config.json beside it.
// Errors are Invalid and Unsupported.
func ReadSentencePiece(tokenizer, conf io.Reader) (Spec, error) {
	const op, name = "tokenizer.ReadSentencePiece", "tokenizer.model"
	b, err := io.ReadAll(io.LimitReader(tokenizer, maxSentencePiece+1))
	if err == nil && len(b) > maxSentencePiece {
		err = fmt.Errorf("more than %d bytes", maxSentencePiece)
	}
	if err != nil {
		return Spec{}, sandbox.E(op, sandbox.Invalid, name, err)
	}
	s, err := parseSentencePiece(b)
	if err == nil && conf != nil {
		var c config
		if err := json.NewDecoder(io.LimitReader(conf, maxJSON)).Decode(&c); err != nil {
			return Spec{}, sandbox.E(op, sandbox.Invalid, "tokenizer_config.json", err)
		}
		err = c.extend(&s)
	}
	if err != nil {
		kind := sandbox.Invalid
		if errors.Is(err, errors.ErrUnsupported) {
			kind = sandbox.Unsupported
		}
		return s, sandbox.E(op, kind, name, err)
	}
	return s, nil
}

// A field is one of a message: a number, or bytes.
type field struct {
	number protowire.Number
	value  uint64 // of whole numbers and the bits of a float
	bytes  []byte
}

// fields calls visit for the fields of a message, one after the other.
func fields(message []byte, visit func(f field) error) error {
	for len(message) > 0 {
		number, typ, n := protowire.ConsumeTag(message)
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		f := field{number: number}
		switch typ {
		case protowire.VarintType:
			f.value, n = protowire.ConsumeVarint(message)
		case protowire.Fixed32Type:
			var v uint32
			v, n = protowire.ConsumeFixed32(message)
			f.value = uint64(v)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(message)
		default:
			n = protowire.ConsumeFieldValue(number, typ, message)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		message = message[n:]
		if err := visit(f); err != nil {
			return err
		}
	}
	return nil
}

func parseSentencePiece(b []byte) (Spec, error) {
	s := Spec{Model: ModelSentencePiece, Unk: 0, BOS: 1, EOS: 2, EOT: -1, AddBOS: true, SpacePrefix: true}
	algorithm := uint64(1) // what the format has for none: unigram
	err := fields(b, func(f field) error {
		switch f.number {
		case modelPiece:
			return s.piece(f.bytes)
		case modelTrainer:
			return fields(f.bytes, func(f field) error {
				switch f.number {
				case trainerType:
					algorithm = f.value
				case trainerUnk:
					s.Unk = int32(f.value) //nolint:gosec // -1 is written with all bits
				case trainerBOS:
					s.BOS = int32(f.value) //nolint:gosec // as above
				case trainerEOS:
					s.EOS = int32(f.value) //nolint:gosec // as above
				case trainerSuffix:
					if f.value != 0 {
						return fmt.Errorf("%w: spaces at the end of words", errors.ErrUnsupported)
					}
				}
				return nil
			})
		case modelNormalizer:
			return s.normalizer(f.bytes)
		}
		return nil
	})
	if err == nil && algorithm != modelBPE {
		err = fmt.Errorf("%w: an algorithm of SentencePiece's that is not BPE (number %d)", errors.ErrUnsupported, algorithm)
	}
	if err == nil {
		err = s.check()
	}
	return s, err
}

// piece reads a token.
func (s *Spec) piece(b []byte) error {
	text, score, typ := "", float32(0), Normal
	err := fields(b, func(f field) error {
		switch f.number {
		case pieceText:
			text = string(f.bytes)
		case pieceScore:
			score = math.Float32frombits(uint32(f.value)) //nolint:gosec // 32 bits were read
		case pieceType:
			typ = TokenType(f.value) //nolint:gosec // checked below
		}
		return nil
	})
	if err != nil {
		return err
	}
	if typ < Normal || typ > Byte || len(s.Tokens) >= maxTokens || score != score {
		return fmt.Errorf("token %d, %.40q, has the type %d and the score %v", len(s.Tokens), text, typ, score)
	}
	s.Tokens, s.Types, s.Scores = append(s.Tokens, text), append(s.Types, typ), append(s.Scores, score)
	return nil
}

// normalizer reads what is done to text first, of which only the space before it is known here.
func (s *Spec) normalizer(b []byte) error {
	trim := true
	err := fields(b, func(f field) error {
		switch f.number {
		case normalizerMap:
			if len(f.bytes) > 0 {
				return fmt.Errorf("%w: text is normalised by a map", errors.ErrUnsupported)
			}
		case normalizerPrefix:
			s.SpacePrefix = f.value != 0
		case normalizerTrim:
			trim = f.value != 0
		case normalizerEscape:
			if f.value == 0 {
				return fmt.Errorf("%w: spaces that stay spaces", errors.ErrUnsupported)
			}
		}
		return nil
	})
	if err == nil && trim {
		err = fmt.Errorf("%w: spaces are removed from text", errors.ErrUnsupported)
	}
	return err
}

// extend adds what a tokenizer_config.json says to a vocabulary: tokens that were added later, and how texts begin and end.
func (c *config) extend(s *Spec) error {
	last := int32(len(s.Tokens)) //nolint:gosec // below maxTokens
	added := map[int32]addedToken{}
	for key, a := range c.Added {
		id, err := strconv.ParseInt(key, 10, 32)
		if err != nil || id < 0 || id >= int64(len(s.Tokens)+len(c.Added)) {
			return fmt.Errorf("an added token, %.40q, has the id %.20q in a vocabulary of %d", a.Content, key, len(s.Tokens))
		}
		added[int32(id)] = a
		last = max(last, int32(id)+1)
	}
	for id := int32(len(s.Tokens)); id < last; id++ { //nolint:gosec // below maxTokens
		s.Tokens, s.Types, s.Scores = append(s.Tokens, fmt.Sprintf("[PAD%d]", id)), append(s.Types, Unused), append(s.Scores, 0)
	}
	for id, a := range added {
		if s.Types[id] == Byte || s.Types[id] == Unknown {
			continue
		}
		s.Tokens[id], s.Types[id] = a.Content, User
		if a.Special {
			s.Types[id] = Control
		}
	}
	s.AddEOS = c.AddEOS
	if c.AddBOS != nil {
		s.AddBOS = *c.AddBOS
	}
	for name, to := range map[tokenName]*int32{c.BOS: &s.BOS, c.EOS: &s.EOS} {
		for id, token := range s.Tokens {
			if name != "" && token == string(name) && s.Types[id] == Control {
				*to = int32(id) //nolint:gosec // below maxTokens
			}
		}
	}
	return nil
}
