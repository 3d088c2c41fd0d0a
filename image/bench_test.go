package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/klauspost/compress/gzip"
)

// BenchmarkConvert converts a compressed root file system of 280 MB in 14,000
// files, half of it code-like and half of it random.
func BenchmarkConvert(b *testing.B) {
	path := filepath.Join(b.TempDir(), "root.tar.gz")
	writeSystem(b, path, 14_000, 20_000)
	s := openStore(b)
	b.ResetTimer()
	var peak uint64
	for n := range b.N {
		i, err := s.ImportFile(context.Background(), path, ImportOptions{Name: fmt.Sprint("bench", n)})
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(i.Size)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapSys)
	}
	b.ReportMetric(float64(peak)/(1<<20), "heap-MB")
}

// writeSystem writes a compressed archive of files of a size each.
func writeSystem(b *testing.B, path string, files, size int) {
	b.Helper()
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	z, _ := gzip.NewWriterLevel(f, gzip.BestSpeed)
	w := tar.NewWriter(z)
	source := rand.NewChaCha8([32]byte{})
	body := make([]byte, size)
	for n := range files {
		_, _ = source.Read(body[:size/2])
		for i := size / 2; i < size; i++ {
			body[i] = "return nil, err\n"[(i+n)%16]
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/d%d/f%d", n%300, n), Mode: 0o644, Size: int64(size)}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			b.Fatal(err)
		}
	}
	for _, c := range []io.Closer{w, z} {
		if err := c.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
