// A Go program that keeps some of what it allocates, and answers as target.h does.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
)

var kept [][]byte
var sum int

//go:noinline
func keepsForever(count int) {
	for i := 0; i < count; i++ {
		block := make([]byte, 16<<10)
		for at := range block {
			block[at] = byte(at)
		}
		kept = append(kept, block)
	}
}

//go:noinline
func usesForAMoment(count int) {
	for i := 0; i < count; i++ {
		block := make([]byte, 16<<10)
		block[i%len(block)] = 1
		sum += int(block[0])
	}
}

func main() {
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		switch {
		case len(words) > 1 && words[0] == "quit":
			code, _ := strconv.Atoi(words[1])
			os.Exit(code)
		case len(words) > 1 && words[0] == "leak":
			mebibytes, _ := strconv.Atoi(words[1])
			for i := 0; i < mebibytes; i++ {
				keepsForever(64)
				usesForAMoment(64)
			}
		}
		fmt.Println("done")
	}
}
