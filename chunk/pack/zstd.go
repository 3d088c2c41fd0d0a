package pack

import (
	"errors"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// encoders are reused, one pool for each level: each has tables and a window of memory.
var encoders [zstd.SpeedBestCompression + 1]sync.Pool

func compress(dst, data []byte, level zstd.EncoderLevel) ([]byte, error) {
	if level < zstd.SpeedFastest || level > zstd.SpeedBestCompression {
		return nil, errors.New("pack: there is no such level")
	}
	enc, _ := encoders[level].Get().(*zstd.Encoder)
	if enc == nil {
		var err error
		enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(4<<20), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, err
		}
	}
	defer encoders[level].Put(enc)
	return enc.EncodeAll(data, dst), nil
}

var decoders = sync.Pool{New: func() any {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(MaxSize), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return err // constant options: never
	}
	return dec
}}

// decompress returns at most size bytes, which the caller has bounded.
func decompress(data []byte, size int) ([]byte, error) {
	dec, ok := decoders.Get().(*zstd.Decoder)
	if !ok {
		return nil, errors.New("no decompressor")
	}
	defer decoders.Put(dec)
	return dec.DecodeAll(data, make([]byte, 0, size))
}
