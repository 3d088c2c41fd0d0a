package transfer

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/klauspost/compress/zstd"
)

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

// pack compresses data with a dictionary that may be empty. What it makes depends on the arguments only.
func pack(data, dictionary []byte, level zstd.EncoderLevel) ([]byte, error) {
	class := encoderClass{level, max(1<<20, 1<<bits.Len(uint(len(data)+len(dictionary)))), len(dictionary) > 0}
	v, _ := encoders.LoadOrStore(class, new(sync.Pool))
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
	if class.dictionary {
		if err := enc.ResetWithOptions(nil, zstd.WithEncoderDictRaw(dictionaryID, dictionary)); err != nil {
			return nil, err
		}
	}
	return enc.EncodeAll(data, nil), nil
}

var decoders = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(window), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return err // constant options: never
	}
	return dec
}}

// unpack decompresses exactly size bytes, which the caller has bounded.
func unpack(data, dictionary []byte, size int) ([]byte, error) {
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
	out, err := dec.DecodeAll(data, make([]byte, 0, size))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if len(out) != size {
		return nil, fmt.Errorf("%w: a frame has %d bytes, not %d", ErrCorrupt, len(out), size)
	}
	return out, nil
}
