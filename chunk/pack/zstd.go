package pack

import (
	"bytes"
	"errors"
	"math/bits"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// MaxDictionary bounds a dictionary, in bytes.
const MaxDictionary = 28 << 20

// dictionaryID marks frames that need their dictionary.
const dictionaryID = 1

// An encoderClass is what cannot be changed in an encoder that is used again.
type encoderClass struct {
	level      zstd.EncoderLevel
	window     int
	dictionary bool // encoders with one are made differently
}

// encoders holds a *sync.Pool of encoders for each encoderClass; each has tables and a window of memory.
var encoders sync.Map

// compress appends data, packed with a dictionary that may be empty. What it makes depends on the arguments only.
func compress(dst, data, dictionary []byte, level zstd.EncoderLevel) ([]byte, error) {
	if level < zstd.SpeedFastest || level > zstd.SpeedBestCompression {
		return nil, errors.New("pack: there is no such level")
	}
	if len(dictionary) > MaxDictionary {
		return nil, errors.New("pack: the dictionary is too large")
	}
	class := encoderClass{level, max(1<<20, 1<<bits.Len(uint(len(data)+len(dictionary)))), len(dictionary) > 0}
	v, ok := encoders.Load(class)
	if !ok {
		v, _ = encoders.LoadOrStore(class, new(sync.Pool))
	}
	pool := v.(*sync.Pool)
	enc, _ := pool.Get().(*zstd.Encoder)
	if enc == nil {
		var err error
		enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(class.window), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, err
		}
	}
	defer pool.Put(enc)
	if !class.dictionary {
		return enc.EncodeAll(data, dst), nil
	}
	// As a stream, since EncodeAll would look at the dictionary once more.
	out := bytes.NewBuffer(dst)
	if err := enc.ResetWithOptions(out, zstd.WithEncoderDictRaw(dictionaryID, dictionary)); err != nil {
		return nil, err
	}
	if _, err := enc.Write(data); err != nil {
		return nil, err
	}
	if err := enc.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

var decoders = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(64<<20), zstd.WithDecodeAllCapLimit(true)) // data and dictionary fit that
	if err != nil {
		return err // constant options: never
	}
	return dec
}}

// decompress returns at most size bytes, which the caller has bounded.
func decompress(data, dictionary []byte, size int) ([]byte, error) {
	dec, ok := decoders.Get().(*zstd.Decoder)
	if !ok {
		return nil, errors.New("no decompressor")
	}
	defer decoders.Put(dec)
	options := []zstd.DOption{zstd.WithDecoderDictDelete()}
	if len(dictionary) > 0 {
		options = append(options, zstd.WithDecoderDictRaw(dictionaryID, dictionary))
	}
	if err := dec.ResetWithOptions(nil, options...); err != nil {
		return nil, err
	}
	return dec.DecodeAll(data, make([]byte, 0, size))
}
