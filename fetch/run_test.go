package fetch

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func FuzzEnvelope(f *testing.F) {
	f.Add([]byte("\x05\x00\x00\x00hello"))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Add([]byte("\x00\x00\x40\x00short"))
	f.Fuzz(func(t *testing.T, data []byte) {
		envelope, err := readEnvelope(bytes.NewReader(data))
		if whole := len(data) >= 4 && uint64(len(data)-4) >= uint64(binary.LittleEndian.Uint32(data)); err == nil && !whole {
			t.Errorf("%d bytes of half an envelope", len(envelope))
		} else if err == nil && !bytes.Equal(envelope, data[4:][:len(envelope)]) {
			t.Error("it is another one")
		}
	})
}
